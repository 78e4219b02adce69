-- The response cache's step in a commit. Keys: `answers.py`. Nothing here may raise once something is written.
(function()
    local IDLE = 90 * 86400
    local AT_ONCE = 1000 -- answers that one put may push out

    local function drop(base, key)
        local size = redis.call('HGET', base .. ':sizes', key)
        redis.call('UNLINK', base .. ':of:' .. key)
        redis.call('HDEL', base .. ':sizes', key)
        redis.call('ZREM', base .. ':used', key)
        redis.call('ZREM', base .. ':ends', key)
        if size then redis.call('DECRBY', base .. ':bytes', size) end
    end

    -- Where it stands among those used: after all others, also of the same moment.
    local function turn(base, now)
        local latest = redis.call('ZREVRANGE', base .. ':used', 0, 0, 'WITHSCORES')[2]
        if latest and tonumber(latest) >= tonumber(now) then return string.format('%.17g', tonumber(latest) + 1e-6) end
        return now
    end

    local function purge(base, now, most)
        local over = redis.call('ZRANGEBYSCORE', base .. ':ends', '-inf', '(' .. now, 'LIMIT', 0, most)
        local idle = redis.call('ZRANGEBYSCORE', base .. ':used', '-inf', string.format('%.17g', tonumber(now) - IDLE), 'LIMIT', 0, most)
        for _, key in ipairs(over) do drop(base, key) end
        for _, key in ipairs(idle) do drop(base, key) end
        -- Of what was cleared, only the values are still there; some may have been put again since.
        local dead = redis.call('ZPOPMIN', base .. ':dead', most)
        for index = 1, #dead, 2 do
            if redis.call('HEXISTS', base .. ':sizes', dead[index]) == 0 then
                redis.call('UNLINK', base .. ':of:' .. dead[index])
            end
        end
        return #over + #idle + #dead / 2
    end

    local operations = {}

    -- key, value, its size, when it ends ('' never), milliseconds until then or until it was not used for long,
    -- now, most answers, most bytes
    function operations.put(base, key, value, size, ends, left, now, entries, bytes)
        drop(base, key)
        purge(base, now, 4)
        if tonumber(size) > tonumber(bytes) or tonumber(left) <= 0 then return end
        redis.call('SET', base .. ':of:' .. key, value, 'PX', left)
        redis.call('HSET', base .. ':sizes', key, size)
        redis.call('ZADD', base .. ':used', turn(base, now), key)
        if ends ~= '' then redis.call('ZADD', base .. ':ends', ends, key) end
        redis.call('INCRBY', base .. ':bytes', size)
        for _ = 1, AT_ONCE do
            local fits = redis.call('ZCARD', base .. ':used') <= tonumber(entries)
            if fits and tonumber(redis.call('GET', base .. ':bytes')) <= tonumber(bytes) then break end
            local oldest = redis.call('ZRANGE', base .. ':used', 0, 0)
            if not oldest[1] then break end
            drop(base, oldest[1])
        end
        for _, name in ipairs({'used', 'sizes', 'ends', 'bytes'}) do
            redis.call('EXPIRE', base .. ':' .. name, IDLE + 86400)
        end
    end

    function operations.touch(base, key, now)
        if not redis.call('ZSCORE', base .. ':used', key) then return end
        redis.call('ZADD', base .. ':used', turn(base, now), key)
        local ends = redis.call('ZSCORE', base .. ':ends', key)
        local left = IDLE
        if ends then left = math.min(left, tonumber(ends) - tonumber(now)) end
        if left > 0 then redis.call('PEXPIRE', base .. ':of:' .. key, string.format('%.0f', left * 1000)) end
        for _, name in ipairs({'used', 'sizes', 'ends', 'bytes'}) do
            redis.call('EXPIRE', base .. ':' .. name, IDLE + 86400)
        end
    end

    function operations.clear(base)
        if redis.call('EXISTS', base .. ':used') == 1 then
            if redis.call('EXISTS', base .. ':dead') == 1 then
                redis.call('ZUNIONSTORE', base .. ':dead', 2, base .. ':dead', base .. ':used')
            else
                redis.call('RENAME', base .. ':used', base .. ':dead')
            end
            redis.call('EXPIRE', base .. ':dead', IDLE + 86400)
        end
        redis.call('UNLINK', base .. ':used', base .. ':sizes', base .. ':ends', base .. ':bytes')
    end

    function operations.purge(base, now, most)
        return purge(base, now, most)
    end

    return function(base, arguments)
        return operations[arguments[1]](base, unpack(arguments, 2)) or 0
    end
end)()
