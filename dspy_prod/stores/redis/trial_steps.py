"""What is done to an experiment inside a commit, where it depends on what is there.

The key of every step is that of the experiment's head, a hash: its declaration and state, its checkpoint, how many
units it has, and for each metric its window (`window <metric>`) and up to which number it was told (`read <metric>`;
`read`: the highest of them). Beside it (`PARTS`) are

    :numbers  hash: unit -> number
    :units    hash: number -> "at stage full propensity arm unit", of the first exposure (names as in keys)
    :later    hash: number -> "stage full arm" a line, of later stages
    :mixed    hash: number -> 1 where it is to be left out, else 0, of units that saw two arms within a stage
    :arms     hash: "u|f|m|e stage full arm" -> units, units seen first there, mixed ones, those of other arms
    :ended    hash: "c|f|b|a arm" -> calls that it answered, failed ones, ones that fell back, abandoned ones
    :calls    hash: number -> "calls failed fell_back nano//1e9 nano%1e9 timed latency unpriced", then the first one's
    :values   hash: "metric number id" -> "value at"
    :ids      sorted set of the fields of `:values`, in the order of metric and number
    :audit    list of decisions
    :calling  sorted set: number by until when a unit is waited for whose call goes on

Nano-USD are in two halves, each summed for itself, for Lua's numbers are exact to 2^53 only. A step raises nothing
once it has written: a script is not undone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from dspy_prod.stores.redis.batch import STEPS

PARTS: Final = ("numbers", "units", "later", "mixed", "arms", "calls", "values", "ids", "audit", "calling", "ended")
"""The keys beside the head."""

HEAD: Final = ("declaration", "windows", "grace", "state", "stage", "since", "revision", "created")
"""Fields of the head that a `Trial` is made of."""

_HEAD = f"redis.call('HMGET', key, {', '.join(map(repr, HEAD))})"

STEPS["trial_create"] = f"""
function(key, args)
  -- (declaration, windows, grace, state, now, then metric and window of each)
  if redis.call('HEXISTS', key, 'revision') == 0 then
    for _, part in ipairs({{{", ".join(map(repr, PARTS))}}}) do redis.call('UNLINK', key .. ':' .. part) end
    redis.call('HSET', key, 'declaration', args[1], 'windows', args[2], 'grace', args[3], 'state', args[4],
      'stage', '0', 'since', args[5], 'revision', '1', 'created', args[5])
    for i = 6, #args, 2 do redis.call('HSET', key, 'window ' .. args[i], args[i + 1]) end
  end
  return {_HEAD}
end
"""

STEPS["trial_change"] = f"""
function(key, args)
  -- (revision, now, line of the audit or '', then field and value of each)
  if redis.call('HGET', key, 'revision') ~= args[1] then return false end
  local moved = false
  for i = 4, #args, 2 do
    moved = moved or (args[i] ~= 'declaration' and redis.call('HGET', key, args[i]) ~= args[i + 1])
    redis.call('HSET', key, args[i], args[i + 1])
  end
  if moved then redis.call('HSET', key, 'since', args[2]) end
  redis.call('HINCRBY', key, 'revision', 1)
  if args[3] ~= '' then redis.call('RPUSH', key .. ':audit', args[3]) end
  return {_HEAD}
end
"""

STEPS["trial_decide"] = """
function(key, args)
  if redis.call('HEXISTS', key, 'revision') == 0 then return 0 end
  return redis.call('RPUSH', key .. ':audit', args[1])
end
"""

STEPS["trial_save"] = """
function(key, args)
  -- (checkpoint, revision it takes the place of, its own, now): who was thought dead is held off by the revision
  if redis.call('HEXISTS', key, 'revision') == 0 then return 0 end
  if (redis.call('HGET', key, 'checkpoint_revision') or '0') ~= args[2] then return 0 end
  redis.call('HSET', key, 'checkpoint', args[1], 'checkpoint_revision', args[3], 'checkpoint_at', args[4])
  return 1
end
"""

STEPS["trial_lease"] = """
function(key, args)
  -- (holder, process, now, until, a process that has ended or '', seconds until the key is of no use)
  local held = redis.call('HMGET', key, 'holder', 'until', 'process')
  if not (held[1] and held[2]) or tonumber(held[2]) <= tonumber(args[3]) or held[1] == args[1]
      or (args[5] ~= '' and held[3] == args[5]) then
    redis.call('HSET', key, 'holder', args[1], 'until', args[4], 'process', args[2])
    redis.call('EXPIRE', key, args[6])
    return {args[1], args[4], args[2]}
  end
  return held
end
"""

STEPS["trial_release"] = """
function(key, args)
  if redis.call('HGET', key, 'holder') == args[1] then redis.call('DEL', key) end
  return 0
end
"""

STEPS["trial_advance"] = """
function(key, args)
  -- (metric, window, before, future, most, over, now)
  -- -> {mark before, mark, 1 where a unit of the future is in the way}
  local metric, window = args[1], tonumber(args[2])
  local before, future, over, now = tonumber(args[3]), tonumber(args[4]), tonumber(args[6]), tonumber(args[7])
  local function told(number)
    if metric == '*' then return redis.call('HEXISTS', key .. ':calls', number) == 1 end
    local first = metric .. ' ' .. string.format('%012d', number)
    return #redis.call('ZRANGEBYLEX', key .. ':ids', '[' .. first .. ' ', '(' .. first .. '!', 'LIMIT', 0, 1) > 0
  end
  local begun = tonumber(redis.call('HGET', key, 'read ' .. metric) or '0')
  local stop = math.min(tonumber(redis.call('HGET', key, 'units') or '0'), begun + tonumber(args[5]))
  local mark, waits, ahead = begun, false, 0
  while mark < stop and not waits do
    local some = {}
    for number = mark + 1, math.min(stop, mark + 500) do some[#some + 1] = string.format('%d', number) end
    for _, unit in ipairs(redis.call('HMGET', key .. ':units', unpack(some))) do
      local at = tonumber(string.match(unit or '', '^%S+'))
      local till = tonumber(redis.call('ZSCORE', key .. ':calling', string.format('%d', mark + 1)) or '')
      local calling = till and till > now
      if at and (calling or at > before) and not (window == 0 and told(mark + 1)) then
        if calling or at <= future then waits = true elseif mark + 1 > over then waits, ahead = true, 1 end
        if waits then break end
      end
      mark = mark + 1
    end
  end
  if mark > begun then
    redis.call('HSET', key, 'read ' .. metric, string.format('%d', mark))
    if mark > tonumber(redis.call('HGET', key, 'read') or '0') then
      redis.call('HSET', key, 'read', string.format('%d', mark))
    end
  end
  return {begun, mark, ahead}
end
"""

STEPS["trial_things"] = Path(__file__).with_name("trial_things.lua").read_text(encoding="utf-8")
