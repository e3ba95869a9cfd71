-- After a loss of the store, hold what is said of users somewhere against what is so (DESIGN §3.6).
-- Who is said to be online and is not is announced as offline. Who is online by a change older than what is said, since
-- the store has lost the newer ones, and is said to be offline, is announced as online.
-- ARGV[2…] per user: user, what is said: online 1 or 0, its version, last active ms ('' when unknown)
-- Returns per user: version (0: as is said, or not certain yet), online, device, last active ms and reason of the change,
-- new or known, that says otherwise.
local out = {}
local certain = settled()
for i = 2, #ARGV, 4 do
  local user, online, said, active = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3])
  local last = redis.call('HMGET', key(user, 'change'), 'version', 'online', 'device', 'reason')
  local known = tonumber(last[1]) or 0
  local version = 0
  if redis.call('SISMEMBER', ONLINE, user) == 1 then
    if online == '0' and known < said then
      floor = math.max(floor, said)
      version = change(user, '1', last[3] or 'web', 'restored')
    end
  elseif certain and online == '1' then
    if last[2] == '0' and known >= said then
      version = known
    else
      floor = math.max(floor, said)
      if active then touch(user, now - active) end
      version = change(user, '0', last[3] or 'web', 'restored')
    end
  end
  last = redis.call('HMGET', key(user, 'change'), 'online', 'device', 'reason')
  for _, value in ipairs({ version, last[1] or '0', last[2] or 'web', redis.call('GET', key(user, 'last_active')) or '' }) do
    out[#out + 1] = value
  end
  out[#out + 1] = last[3] or 'restored'
end
return out
