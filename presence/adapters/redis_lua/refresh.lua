-- Renew leases (guide, Heartbeat Flow). Never makes a session: a lapsed one is reported.
-- ARGV[2…] per session: user, session, device, lease ms, idle ms since its last activity (-1: not an activity)
-- Returns per session: 1 renewed, 0 lapsed.
local out = {}
for i = 2, #ARGV, 5 do
  local user, session = ARGV[i], ARGV[i + 1]
  if redis.call('ZSCORE', key(user, 'sessions'), session) then
    redis.call('HDEL', key(user, 'lost'), session) -- of an end that waited for the amnesty
    set_lease(user, session, ARGV[i + 2], now + tonumber(ARGV[i + 3]))
    touch(user, tonumber(ARGV[i + 4]))
    out[#out + 1] = 1
  else
    out[#out + 1] = 0
  end
end
return out
