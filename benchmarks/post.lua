-- Posts the lines of a file in turn, each a JSON body: wrk --script post.lua URL -- FILE. Prints its figures as JSON.
-- With a second file, whose lines are names, the body's model is the next of these: -- FILE NAMES.
local requests, turn = {}, 0

function init(args)
   local bodies, names = {}, {}
   for body in io.lines(args[1]) do
      bodies[#bodies + 1] = body
   end
   for name in args[2] and io.lines(args[2]) or function() end do
      names[#names + 1] = name
   end
   for number = 1, math.max(#bodies, #names) do
      local headers = {["Content-Type"] = "application/json"}
      if #names > 0 then
         headers["X-Amzn-SageMaker-Target-Model"] = names[(number - 1) % #names + 1]
      end
      requests[number] = wrk.format("POST", nil, headers, bodies[(number - 1) % #bodies + 1])
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
