-- End the sessions whose lease is over (guide, Offline Flow (Timeout); DESIGN §3.3), or begin an amnesty (§3.6).
-- ARGV[2] longest lease ms  [3] amnesty ms  [4] most sessions to end in this call
-- ARGV[5] ms within which another instance's sweep is enough
-- Returns: epoch µs of the last amnesty, ms of it left, 1 when more sessions are due, the highest version given out.
local lease, limit = tonumber(ARGV[2]), tonumber(ARGV[4])
local SWEPT, AMNESTY = BASE .. 'swept', BASE .. 'amnesty'
local amnesty = redis.call('HMGET', AMNESTY, 'epoch', 'till', 'server')
local epoch, till = tonumber(amnesty[1]), tonumber(amnesty[2])
local swept = tonumber(redis.call('GET', SWEPT))
local version = tonumber(redis.call('GET', VERSION)) or 0

-- Late, empty, another primary, or a clock that was set: what the store says of sessions is not to be trusted yet.
-- A gap of half a lease is enough for one who beats twice a lease to have lapsed meanwhile; and nobody needs longer than
-- a lease to be heard of again.
local gap = math.min(3000, math.max(1000, lease / 2))
local span = math.min(tonumber(ARGV[3]), lease)
if not swept or not till or math.abs(now - swept) > gap or till - now > tonumber(ARGV[3]) + 60000 or amnesty[3] ~= server then
  epoch, till = now_us, now + span
  redis.call('HSET', AMNESTY, 'epoch', int(epoch), 'till', int(till), 'server', server)
  swept = nil
end
if floor > version then
  version = floor
  redis.call('SET', VERSION, int(version))
end
if swept and now >= swept and now - swept < tonumber(ARGV[5]) then
  return { epoch, math.max(0, till - now), 0, version }
end
redis.call('SET', SWEPT, int(now))
if now < till then return { epoch, till - now, 0, version } end

local due = redis.call('ZRANGEBYSCORE', DEADLINES, '-inf', '(' .. int(now), 'LIMIT', 0, limit)
for _, member in ipairs(due) do
  local user, session = string.match(member, '^(.-):(.*)$')
  local reason = redis.call('HGET', key(user, 'lost'), session) or 'expired'
  local device = drop(user, session) -- looks at the session's key, so that Redis publishes the guide's `expired` event now
  redis.call('ZREM', DEADLINES, member)
  if device then version = math.max(version, offline_if_last(user, device, reason)) end
end
-- A clock that stepped back left leases that end too late.
local late = redis.call('ZRANGEBYSCORE', DEADLINES, '(' .. int(now + lease), '+inf', 'LIMIT', 0, limit)
for _, member in ipairs(late) do
  local user, session = string.match(member, '^(.-):(.*)$')
  if redis.call('ZSCORE', key(user, 'sessions'), session) then
    set_lease(user, session, redis.call('GET', session_key(user, session)) or 'web', now + lease)
  else
    redis.call('ZREM', DEADLINES, member)
  end
end
local more = #due == limit or #late == limit
if more then redis.call('DECRBY', SWEPT, ARGV[5]) end -- the next call is to go on at once
return { epoch, 0, more and 1 or 0, version }
