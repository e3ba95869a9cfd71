-- Announce as offline whoever is said to be online somewhere and is not (DESIGN §3.6).
-- ARGV[2…] per user: user, version under which it is said, last active ms ('' when unknown)
-- Returns per user: version (0: online, or not certain yet), device and last active ms of its offline change, new or known.
local out = {}
local certain = settled()
for i = 2, #ARGV, 3 do
  local user, said, active = ARGV[i], tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2])
  local version = 0
  if certain and redis.call('SISMEMBER', ONLINE, user) == 0 then
    local last = redis.call('HMGET', key(user, 'change'), 'version', 'online', 'device')
    if last[2] == '0' and tonumber(last[1]) >= said then
      version = tonumber(last[1])
    else
      floor = math.max(floor, said)
      if active then touch(user, now - active) end
      version = change(user, '0', last[3] or 'web', 'restored')
    end
  end
  out[#out + 1] = version
  out[#out + 1] = redis.call('HGET', key(user, 'change'), 'device') or 'web'
  out[#out + 1] = redis.call('GET', key(user, 'last_active')) or ''
end
return out
