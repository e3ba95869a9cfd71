-- End sessions; their users are offline if these were the last ones (guide, Offline Flow).
-- ARGV[2…] per session: user, session, reason, idle ms since its last activity
-- Returns per session: the change's version, 0 when there is none. Ending twice, or nothing, is a no-op.
local out = {}
local certain = settled()
for i = 2, #ARGV, 4 do
  local user, session, reason, idle = ARGV[i], ARGV[i + 1], ARGV[i + 2], tonumber(ARGV[i + 3])
  if certain or redis.call('ZCARD', key(user, 'sessions')) > 1 then
    local device = drop(user, session)
    if device then touch(user, idle) end
    out[#out + 1] = device and offline_if_last(user, device, reason) or 0
  else -- it may not be the last: others may still be to be reported. The sweep ends it after the amnesty (DESIGN §3.6).
    if shorten(user, session, reason, 0) then touch(user, idle) end
    out[#out + 1] = 0
  end
end
return out
