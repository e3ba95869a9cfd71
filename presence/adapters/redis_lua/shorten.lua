-- Leave sessions whose connection is gone a shorter lease (WIRE §4: grace, drain). The sweep does the rest.
-- ARGV[2…] per session: user, session, reason kept for the end, idle ms since its last activity, rest of the lease in ms
-- Returns per session: 1 shortened, 0 it had ended already.
local out = {}
for i = 2, #ARGV, 5 do
  local user, session = ARGV[i], ARGV[i + 1]
  local till = tonumber(redis.call('ZSCORE', key(user, 'sessions'), session))
  if till then
    local device = redis.call('GET', session_key(user, session)) or 'web'
    redis.call('HSET', key(user, 'lost'), session, ARGV[i + 2])
    redis.call('PEXPIRE', key(user, 'lost'), LONG)
    set_lease(user, session, device, math.min(till, now + tonumber(ARGV[i + 4])))
    touch(user, tonumber(ARGV[i + 3]))
    out[#out + 1] = 1
  else
    out[#out + 1] = 0
  end
end
return out
