-- Posts the lines of a file in turn, each a JSON body, and prints as JSON what became of them:
--   wrk --script offer.lua URL -- FILE RATE WARM_UP SECONDS
-- RATE is requests a second, each at its time whatever became of those before, or 0: on each connection the next when
-- one is answered. A time for which no connection was free is passed over. What is accepted before WARM_UP seconds or
-- after SECONDS is no goodput. Every request's id is the time of its sending, which the server sends back.
local ffi = require("ffi")
ffi.cdef("typedef struct { long s; long ns; } moment; int clock_gettime(int, moment *);")
local moment = ffi.new("moment")

local function now_us()
   ffi.C.clock_gettime(1, moment)
   return tonumber(moment.s) * 1000000 + tonumber(moment.ns) / 1000
end

local thread
function setup(only)
   thread = only
end

local requests, turn = {}, 0
local period_us, warm_up_us, end_us, began_us, due_us
sent, in_time, unsaid, longest_s, statuses, latencies_us = 0, 0, 0, -1, {}, {}

function init(args)
   for body in io.lines(args[1]) do
      local request = wrk.format("POST", nil, {["Content-Type"] = "application/json", ["X-Request-Id"] = "TIME"}, body)
      local from, to = request:find("TIME", 1, true)
      requests[#requests + 1] = {request:sub(1, from - 1), request:sub(to + 1)}
   end
   local rate = tonumber(args[2])
   if rate > 0 then
      period_us, delay = 1000000 / rate, wait
   end
   warm_up_us, end_us = 1000000 * args[3], 1000000 * args[4]
   request() -- wrk asks for one more and never sends it, nor this
   began_us, due_us = now_us(), now_us()
   sent = -1
end

function wait()
   due_us = math.max(due_us + period_us, now_us())
   return math.floor((due_us - now_us()) / 1000 + 0.5)
end

function request()
   turn, sent = turn % #requests + 1, sent + 1
   local parts = requests[turn]
   return parts[1] .. string.format("%.0f", now_us()) .. parts[2]
end

function response(status, headers)
   statuses[status] = (statuses[status] or 0) + 1
   local now = now_us()
   if status == 200 then
      latencies_us[#latencies_us + 1] = now - tonumber(headers["x-request-id"])
      if now - began_us >= warm_up_us and now - began_us < end_us then
         in_time = in_time + 1
      end
   elseif status == 429 then
      local retry = tonumber(headers["retry-after"])
      if retry then
         longest_s = math.max(longest_s, retry)
      else
         unsaid = unsaid + 1
      end
   end
end

function done(summary)
   local counts, errors = {}, summary.errors
   for status, count in pairs(thread:get("statuses")) do
      counts[#counts + 1] = string.format('"%d": %d', status, count)
   end
   io.write(string.format(
      '{"sent": %d, "in_time": %d, "unsaid": %d, "retry_s": %d, "broken": %d, "statuses": {%s}, "latencies_us": [%s]}\n',
      thread:get("sent"), thread:get("in_time"), thread:get("unsaid"), thread:get("longest_s"),
      errors.connect + errors.read + errors.write + errors.timeout,
      table.concat(counts, ", "), table.concat(thread:get("latencies_us"), ", ")))
end
