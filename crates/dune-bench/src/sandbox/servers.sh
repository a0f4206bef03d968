# Starts a server on loopback, loads it, and ends it. The whole of it runs under one contender: not
# every one of them lets its programs be reached from outside. Arguments: kind, requests, clients, folder.
set -eu
PATH=$PATH:/usr/sbin
kind=$1 requests=$2 clients=$3 folder=$4
port=$((20000 + $$ % 20000))
cd "$folder"
server=
finish() {
    if [ -n "$server" ]; then kill "$server" || :; wait "$server" || :; fi
}
trap finish EXIT
case $kind in
redis)
    redis-server --port "$port" --bind 127.0.0.1 --save '' --appendonly no --daemonize no >server.log 2>&1 &
    server=$!
    tries=0
    until redis-cli -p "$port" ping >/dev/null 2>&1; do
        tries=$((tries + 1)); [ $tries -lt 100 ] || { cat server.log >&2; exit 1; }
        sleep 0.1
    done
    redis-benchmark -p "$port" -n "$requests" -c "$clients" -t set,get --csv
    ;;
nginx)
    mkdir -p page logs
    head -c 1024 /dev/zero | tr '\0' x >page/index.html
    cat >nginx.conf <<END
daemon off;
worker_processes 1;
pid $folder/nginx.pid;
error_log stderr;
events { worker_connections 256; }
http {
    access_log off;
    keepalive_requests 1000000;
    client_body_temp_path $folder/logs; proxy_temp_path $folder/logs; fastcgi_temp_path $folder/logs;
    uwsgi_temp_path $folder/logs; scgi_temp_path $folder/logs;
    server { listen 127.0.0.1:$port; root $folder/page; }
}
END
    nginx -c "$folder/nginx.conf" -e stderr >server.log 2>&1 &
    server=$!
    tries=0
    until ab -q -n 1 "http://127.0.0.1:$port/index.html" >/dev/null 2>&1; do
        tries=$((tries + 1)); [ $tries -lt 100 ] || { cat server.log >&2; exit 1; }
        sleep 0.1
    done
    ab -q -k -n "$requests" -c "$clients" -e percentiles.csv "http://127.0.0.1:$port/index.html"
    cat percentiles.csv
    ;;
esac
