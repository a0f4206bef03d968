# A server with two loads of redis-benchmark, scripts, transactions, a subscriber, a snapshot by fork; ended and started again.
port=$((20000 + $$ % 20000))
start() {
    redis-server --port $port --bind 127.0.0.1 --dir "$PWD" --save '' --appendonly yes --appendfsync no --daemonize no >>server.log 2>&1 &
    server=$!
    tries=0
    until [ "$(redis-cli -p $port ping 2>/dev/null)" = PONG ]; do
        tries=$((tries + 1)); [ $tries -lt 200 ] || { cat server.log; exit 1; }
        sleep 0.1
    done
}
cli() { redis-cli -p $port "$@"; }
start
redis-benchmark -p $port -n 3000 -c 20 -t set,get,incr,lpush,lpop,sadd,hset,zadd --csv >bench.csv 2>bench.err; echo "benchmark $? $(grep -c '^"' bench.csv)"
redis-benchmark -p $port -n 4000 -c 10 -P 16 -q incr total >pipelined.log 2>&1; echo "pipelined $? $(cli get total) $(cli get counter:__rand_int__)"
cli eval 'for i = 1, 1000 do redis.call("zadd", KEYS[1], i * 37 % 1000, "m" .. i) end return redis.call("zcard", KEYS[1])' 1 scores
cli zrange scores 0 4 withscores | paste -sd' '
printf 'multi\nset a 1\nincrby a 41\nget a\nexec\n' | redis-cli -p $port | paste -sd' '
(timeout 20 redis-cli -p $port subscribe news >news.log) & subscriber=$!
tries=0; until [ "$(cli publish news hello)" = 1 ] || [ $tries -ge 200 ]; do tries=$((tries + 1)); sleep 0.05; done
tries=0; until grep -q hello news.log || [ $tries -ge 100 ]; do tries=$((tries + 1)); sleep 0.05; done
tail -n 1 news.log; kill $subscriber 2>/dev/null; wait $subscriber 2>/dev/null
cli debug jmap >/dev/null 2>&1; cli bgsave | cut -c1-10; tries=0
until [ "$(cli info persistence | tr -d '\r' | sed -n 's/^rdb_bgsave_in_progress://p')" = 0 ] || [ $tries -ge 300 ]; do tries=$((tries + 1)); sleep 0.1; done
cli info persistence | tr -d '\r' | grep -E '^rdb_last_bgsave_status'; ls dump.rdb
cli bgrewriteaof | cut -c1-10; sleep 1; cli dbsize; cli shutdown nosave; wait $server; echo "ended $?"
start; cli dbsize; cli get total; cli zcard scores; kill -TERM $server; wait $server; echo "ended $?"
