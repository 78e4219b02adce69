function(key, args)
  -- What happened to units of one experiment, in the order in which it was posted. See `trial_steps.py` for the keys.
  -- (most units, most values, most underway, now, by how much clocks may differ, then of each thing its kind and what it is made of)
  local call = redis.call
  if call('HEXISTS', key, 'revision') == 0 then return 0 end
  local most_units, most_values = tonumber(args[1]), tonumber(args[2])
  local most_underway, now, early = tonumber(args[3]), tonumber(args[4]), tonumber(args[5])
  local known, windows, marks = {}, {}, {}

  local function unit(name)
    if known[name] == nil then
      local number = call('HGET', key .. ':numbers', name)
      local row = number and call('HGET', key .. ':units', number)
      local at, stage, full, arm = string.match(row or '', '^(%S+) (%S+) (%S+) %S+ (%S*) ')
      known[name] = at and {number = number, at = tonumber(at), stage = stage, full = full, arm = arm} or false
    end
    return known[name]
  end
  local function window(metric)
    if windows[metric] == nil then windows[metric] = tonumber(call('HGET', key, 'window ' .. metric) or '') or false end
    return windows[metric]
  end
  local function read(metric)
    if not marks[metric] then marks[metric] = tonumber(call('HGET', key, 'read ' .. metric) or '0') end
    return marks[metric]
  end
  local function lose(how) call('HINCRBY', key, how, 1) end
  local function count(what, slot) call('HINCRBY', key .. ':arms', what .. ' ' .. slot, 1) end

  local function expose(name, stage, full, arm, chance, row)
    local slot, found = stage .. ' ' .. full .. ' ' .. arm, unit(name)
    if not found then
      if chance == '0' then return end
      if tonumber(call('HGET', key, 'units') or '0') >= most_units then return lose('unkept') end
      local number = string.format('%d', call('HINCRBY', key, 'units', 1))
      call('HSET', key .. ':units', number, row)
      call('HSET', key .. ':numbers', name, number)
      known[name] =
        {number = number, at = tonumber(string.match(row, '^%S+')), stage = stage, full = full, arm = arm}
      count('u', slot)
      return count('f', slot)
    end
    local had, was_full = found.arm, found.full
    local later, been = '', found.arm == arm
    if stage ~= found.stage then
      had, later = nil, call('HGET', key .. ':later', found.number) or ''
      for each, its_full, its_arm in string.gmatch(later, '(%S+) (%S+) (%S*)\n') do
        if each == stage then had, was_full = its_arm, its_full end
        been = been or its_arm == arm
      end
    end
    if not had then
      if chance == '0' then return end
      call('HSET', key .. ':later', found.number, later .. slot .. '\n')
      count('u', slot)
      if not been then count('e', slot) end
    elseif had ~= arm and call('HEXISTS', key .. ':mixed', found.number) == 0 then
      local told = tonumber(call('HGET', key, 'read') or '0')
      call('HSET', key .. ':mixed', found.number, tonumber(found.number) > told and '1' or '0')
      count('m', stage .. ' ' .. was_full .. ' ' .. had)
      lose('mixed')
    end
  end

  local function takes(found, metric, at, has)
    if tonumber(found.number) <= read(metric) then return false end
    if window(metric) == 0 then return not has end
    return at <= found.at + window(metric)
  end

  local function called(name, at, failed, fell, high, low, timed, latency, unpriced, arm, left)
    local found = unit(name)
    if not (found and window('*')) then return end
    if arm ~= '' then
      for what, one in pairs({c = '1', f = failed, b = fell, a = left}) do
        if one ~= '0' then call('HINCRBY', key .. ':ended', what .. ' ' .. arm, 1) end
      end
    end
    local kept = call('HGET', key .. ':calls', found.number)
    local beyond = kept
    if window('*') ~= 0 then beyond = tonumber(at) > found.at + window('*') end
    if beyond or (arm ~= '' and arm ~= found.arm) then return lose('repeated') end
    if not takes(found, '*', tonumber(at), kept) then return lose('late') end
    local first = failed .. ' ' .. fell .. ' ' .. high .. ' ' .. low .. ' ' .. timed .. ' ' .. latency .. ' ' .. unpriced
    local sums = {1, failed, fell, high, low, timed, latency, unpriced}
    if kept then
      local had = {string.match(kept, '^(%S+) (%S+) (%S+) (%S+) (%S+) (%S+) (%S+) (%S+) (.*)$')}
      for i = 1, 8 do sums[i] = sums[i] + (tonumber(had[i]) or 0) end
      first = had[9] or first
    end
    call('HSET', key .. ':calls', found.number, string.format('%.0f %.0f %.0f %.0f %.0f %.0f %.17g %.0f %s',
      sums[1], sums[2], sums[3], sums[4], sums[5], sums[6], sums[7], sums[8], first))
    if unpriced ~= '0' then lose('unpriced') end
  end

  local function valued(name, metric, id, value, at)
    local found = unit(name)
    if not (found and window(metric)) or value == '' then return lose('stray') end
    local first = metric .. ' ' .. string.format('%012d', found.number)
    local field = first .. ' ' .. id
    local fresh = call('HEXISTS', key .. ':values', field) == 0
    local has = window(metric) == 0 and (fresh or id == '-') and
      #call('ZRANGEBYLEX', key .. ':ids', '[' .. first .. ' ', '(' .. first .. '!', 'LIMIT', 0, 1) > 0
    if not takes(found, metric, tonumber(at), has) then return lose('late') end
    if tonumber(at) < found.at - early and found.at <= now + early then return lose('early') end
    if fresh then
      if tonumber(call('HGET', key, 'values') or '0') >= most_values then return lose('unkept') end
      call('HINCRBY', key, 'values', 1)
      call('ZADD', key .. ':ids', 0, field)
    end
    call('HSET', key .. ':values', field, value .. ' ' .. at)
  end

  local function goes_on(name, till)
    local found, calling = unit(name), key .. ':calling'
    if not found then return end
    local said = tonumber(call('ZSCORE', calling, found.number) or '')
    if not said and call('ZCARD', calling) >= most_underway then
      call('ZREMRANGEBYSCORE', calling, '-inf', args[4])
      if call('ZCARD', calling) >= most_underway then return end
    end
    if not said or tonumber(till) > said then call('ZADD', calling, till, found.number) end
  end

  -- 'm': what follows is of the experiment that was made then, or of any; it is left out where there is another one.
  local i, its = 6, true
  while i <= #args do
    local kind = args[i]
    if kind == 'm' then
      its = args[i + 1] == '' or tonumber(args[i + 1]) == tonumber(call('HGET', key, 'created'))
      i = i + 2
    elseif kind == 'e' then
      if its then
        expose(args[i + 1], args[i + 2], args[i + 3], args[i + 4], args[i + 5], args[i + 6])
      end
      i = i + 7
    elseif kind == 'c' then
      if its then
        called(args[i + 1], args[i + 2], args[i + 3], args[i + 4], args[i + 5], args[i + 6], args[i + 7], args[i + 8],
          args[i + 9], args[i + 10], args[i + 11])
      end
      i = i + 12
    elseif kind == 'w' then
      if its then goes_on(args[i + 1], args[i + 2]) end
      i = i + 3
    else
      if its then valued(args[i + 1], args[i + 2], args[i + 3], args[i + 4], args[i + 5]) end
      i = i + 6
    end
  end
  return 1
end
