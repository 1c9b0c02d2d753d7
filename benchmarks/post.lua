-- Posts the lines of a file in turn, each a JSON body: wrk --script post.lua URL -- FILE. Prints its figures as JSON.
local requests, turn = {}, 0

function init(args)
   for body in io.lines(args[1]) do
      requests[#requests + 1] = wrk.format("POST", nil, {["Content-Type"] = "application/json"}, body)
   end
end

function request()
   turn = turn % #requests + 1
   return requests[turn]
end

function done(summary, latency)
   local errors = summary.errors
   local shape = '{"answers": %d, "duration_us": %d, "p50_us": %d, "p99_us": %d, '
      .. '"refused": %d, "unanswered": %d, "late": %d}\n'
   io.write(shape:format(
      summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
      errors.status, errors.connect + errors.read + errors.write, errors.timeout))
end
