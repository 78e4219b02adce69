-- The sums of the ledger: of each value a place in a string of numbers, ten for each.

local function place(base, day, dimension, value, ttl)
    local slots = base .. ':slots:' .. day .. ':' .. dimension
    local found = redis.call('HGET', slots, value)
    if found then return tonumber(found) end
    local values = base .. ':values:' .. day
    if value ~= OTHER and tonumber(redis.call('GET', values) or '0') >= VALUES_OF_DAY then
        return place(base, day, dimension, OTHER, ttl)
    end
    redis.call('INCR', values)
    found = redis.call('HLEN', slots)
    redis.call('HSET', slots, value, found)
    redis.call('APPEND', base .. ':names:' .. day .. ':' .. dimension, cjson.encode(value) .. ',')
    return found
end

-- Add ten numbers (as texts: they may have more digits than a double) to a slot's; beyond 64 bits they stay there.
local function add(base, day, dimension, at, numbers, ttl)
    local key, command = base .. ':sums:' .. day .. ':' .. dimension, {'OVERFLOW', 'SAT'}
    for index, number in ipairs(numbers) do
        if number ~= '0' then
            command[#command + 1] = 'INCRBY'
            command[#command + 1] = 'i64'
            command[#command + 1] = '#' .. (at * 10 + index - 1)
            command[#command + 1] = number
        end
    end
    if #command > 2 then redis.call('BITFIELD', key, unpack(command)) end
    if ttl then
        for _, kind in ipairs({':sums:', ':slots:', ':names:'}) do
            renew(base .. kind .. day .. ':' .. dimension, ttl)
        end
        renew(base .. ':values:' .. day, ttl)
    end
end

-- `day_of`: the civil date of a number of days since 1970.
local function date(number)
    local z = number + 719468
    local era = math.floor(z / 146097)
    local doe = z - era * 146097
    local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
    local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
    local mp = math.floor((5 * doy + 2) / 153)
    local month = mp < 10 and mp + 3 or mp - 9
    local year = yoe + era * 400 + (month <= 2 and 1 or 0)
    return string.format('%04d-%02d-%02d', year, month, doy - math.floor((153 * mp + 2) / 5) + 1)
end

local function part(name)
    return (string.gsub(string.gsub(name, '%%', '%%25'), '/', '%%2F'))
end

-- `rollup_keys`.
local function pairs_of(row)
    local found = {}
    local function sum(dimension, value)
        if type(value) ~= 'string' then return end
        if string.match(value, '^\\*%(other%)$') then value = '\\' .. value end
        found[#found + 1] = {dimension, value}
    end
    sum('model', row.model)
    sum('user', row.user)
    sum('tenant', row.tenant)
    sum('program', row.program)
    sum('experiment', row.experiment)
    if type(row.variant) == 'string' then
        if type(row.experiment) == 'string' then
            sum('variant', part(row.experiment) .. '/' .. part(row.variant))
        else
            sum('variant', part(row.variant))
        end
    end
    sum('prompt', row.prompt_version)
    sum('run', row.run)
    for _, tag in ipairs(type(row.tags) == 'table' and row.tags or {}) do
        if type(tag) == 'table' and type(tag[1]) == 'string' then sum('tag:' .. tag[1], tag[2]) end
    end
    return found
end

-- Take out of the sums what a record added to them: `Totals.of`, negative.
local function undo(base, row)
    if row.outcome == 'refused' or type(row.started_at) ~= 'number' then return end
    local function number(value)
        return type(value) == 'number' and value or 0
    end
    local cached, priced = row.cached == true, type(row.cost_nano) == 'number'
    local saved = cached and type(row.saved_nano) == 'number'
    local totals = {
        number(row.cost_nano), row.estimated == true and number(row.cost_nano) or 0, priced and 0 or 1,
        cached and 0 or 1, cached and 1 or 0, (not cached and row.outcome ~= 'ok') and 1 or 0,
        number(row.input_tokens), number(row.output_tokens), saved and row.saved_nano or 0, saved and 1 or 0,
    }
    for index, value in ipairs(totals) do
        totals[index] = value == 0 and '0' or string.format('%.0f', -value)
    end
    local day = date(math.floor(row.started_at / DAY))
    local function take(of, dimension, value)
        local slots = base .. ':slots:' .. of .. ':' .. dimension
        local at = redis.call('HGET', slots, value) or redis.call('HGET', slots, OTHER)
        if at then add(base, of, dimension, tonumber(at), totals, nil) end
    end
    take('', 'day', day)
    for _, pair in ipairs(pairs_of(row)) do
        take(day, pair[1], pair[2])
    end
end
