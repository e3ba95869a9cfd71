-- End sessions; their users are offline if these were the last ones (guide, Offline Flow).
-- ARGV[2…] per session: user, session, reason, idle ms since its last activity
-- Returns per session: the change's version, 0 when there is none. Ending twice, or nothing, is a no-op.
local out = {}
for i = 2, #ARGV, 4 do
  local user = ARGV[i]
  local device = drop(user, ARGV[i + 1])
  if device then touch(user, tonumber(ARGV[i + 3])) end
  out[#out + 1] = device and offline_if_last(user, device, ARGV[i + 2]) or 0
end
return out
