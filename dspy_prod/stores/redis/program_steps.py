"""What is done to the records of programs' calls inside a commit, where it depends on what is there.

calls                        hash: id -> JSON
programs:by:started             sorted set of "moment id", in that order: moments are written so that they sort
programs:by:<field>             sorted set of "value \\0 moment id", of each field of `INDEXED`
programs:days                   set of days that have sums
programs:ends:<day>             hash: "dimension \\0 value" -> the ends ([status, reason] in JSON) that calls of it had
programs:sums:<day>:<dimension> hash: "<place of the sum>end \\0 value" -> the sum
"""

from __future__ import annotations

from typing import Final

from dspy_prod.stores.redis.batch import STEPS

INDEXED: Final = ("trace_id", "session", "user", "run", "experiment")
"""Fields by which calls are found without looking at others; the rest have few values each."""
STARTED: Final = "started"
MOMENT: Final = 32
"""How long a moment is, as it is written."""
FORGOTTEN: Final = 1_000
"""Records that are forgotten in one commit, at most, beside as many as it adds."""

STEPS["program_calls"] = f"""
function(key, args)
  -- (most, then of each its id, JSON, moment, how many fields, and the name and value of each)
  local by, added = key .. ':by:', 0
  local i = 2
  while i <= #args do
    local id, moment, fields = args[i], args[i + 2], tonumber(args[i + 3])
    if redis.call('HSETNX', key, id, args[i + 1]) == 1 then
      added = added + 1
      redis.call('ZADD', by .. '{STARTED}', 0, moment .. id)
      for j = i + 4, i + 3 + 2 * fields, 2 do
        redis.call('ZADD', by .. args[j], 0, args[j + 1] .. '\\0' .. moment .. id)
      end
    end
    i = i + 4 + 2 * fields
  end
  local over = redis.call('ZCARD', by .. '{STARTED}') - tonumber(args[1])
  if over <= 0 then return added end
  local oldest = redis.call('ZPOPMIN', by .. '{STARTED}', math.min(over, added + {FORGOTTEN}))
  for j = 1, #oldest, 2 do
    local id = string.sub(oldest[j], {MOMENT + 1})
    local fine, row = pcall(cjson.decode, redis.call('HGET', key, id) or '')
    if fine then
      for _, field in ipairs({{{", ".join(map(repr, INDEXED))}}}) do
        if type(row[field]) == 'string' then redis.call('ZREM', by .. field, row[field] .. '\\0' .. oldest[j]) end
      end
    end
    redis.call('HDEL', key, id)
  end
  return added
end
"""

STEPS["program_sums"] = """
function(key, args)
  -- (most values, where the keys of the sums begin, the value of the others, then dimension, its part of a key, value,
  --  end, how many sums, and place and amount of each). A sum ends at the largest number there is.
  local most, sums, others = tonumber(args[1]), args[2], args[3]
  local i = 4
  while i <= #args do
    local dimension, value, ended, amounts = args[i], args[i + 2], args[i + 3], tonumber(args[i + 4])
    local ends = redis.call('HGET', key, dimension .. '\\0' .. value)
    if not ends and redis.call('HLEN', key) >= most then
      value = others
      ends = redis.call('HGET', key, dimension .. '\\0' .. value)
    end
    if not string.find(ends or '', ended, 1, true) then
      redis.call('HSET', key, dimension .. '\\0' .. value, ends and (ends .. ',' .. ended) or ended)
    end
    for j = i + 5, i + 4 + 2 * amounts, 2 do
      local field = args[j] .. ended .. '\\0' .. value
      local told = redis.pcall('HINCRBY', sums .. args[i + 1], field, args[j + 1])
      if type(told) == 'table' and told.err then
        redis.call('HSET', sums .. args[i + 1], field, '9223372036854775807')
      end
    end
    i = i + 5 + 2 * amounts
  end
  return 0
end
"""

FIND: Final = """
-- Newest first, the rows of an index from a member on that have all these texts in them; reads only. (from, to, how
-- many to look at, how long a member is before the id, texts) -> {how many there were, the last member, rows...}
local members = redis.call('ZREVRANGEBYLEX', KEYS[1], ARGV[1], ARGV[2], 'LIMIT', 0, ARGV[3])
local found, ids = {#members, members[#members] or ''}, {}
for i, member in ipairs(members) do ids[i] = string.sub(member, ARGV[4] + 1) end
for _, row in ipairs(#ids > 0 and redis.call('HMGET', KEYS[2], unpack(ids)) or {}) do
  local fits = row
  for i = 5, #ARGV do fits = fits and string.find(row, ARGV[i], 1, true) end
  if fits then found[#found + 1] = row end
end
return found
"""
