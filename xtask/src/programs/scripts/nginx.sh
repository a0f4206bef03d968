# Two workers under load: small and large files, keep-alive and not, a reload in the middle; every request is in the log.
port=$((20000 + $$ % 20000)); folder=$PWD
mkdir -p page/deep temp
head -c 1024 /dev/zero | tr '\0' x >page/small.html; seq 1 200000 >page/large.txt; echo deep >page/deep/index.html
cat >nginx.conf <<END
daemon off; worker_processes 2; pid $folder/nginx.pid; error_log $folder/error.log warn;
$([ "$(id -u)" = 0 ] && echo 'user root;')
events { worker_connections 256; }
http {
    access_log $folder/access.log; sendfile on; gzip on; gzip_types text/plain; keepalive_requests 100000; default_type text/plain;
    client_body_temp_path $folder/temp; proxy_temp_path $folder/temp; fastcgi_temp_path $folder/temp; uwsgi_temp_path $folder/temp; scgi_temp_path $folder/temp;
    server {
        listen 127.0.0.1:$port; root $folder/page;
        location /proxied/ { proxy_pass http://127.0.0.1:$port/; }
        location /gone { return 410 "gone\n"; }
    }
}
END
nginx -t -c "$folder/nginx.conf" -e "$folder/error.log" 2>&1 | sed "s,$folder,,g"
nginx -c "$folder/nginx.conf" -e "$folder/error.log" & server=$!
url=http://127.0.0.1:$port
tries=0; until ab -q -n 1 $url/small.html >/dev/null 2>&1; do tries=$((tries + 1)); [ $tries -lt 200 ] || { cat error.log; exit 1; }; sleep 0.1; done
: >access.log
load() { ab -q "$@" 2>&1 | grep -E '^(Complete requests|Failed requests|Non-2xx|Document Length|HTML transferred|apr_)'; }
load -k -n 2000 -c 10 $url/small.html; load -n 300 -c 5 $url/small.html; load -k -n 60 -c 4 $url/large.txt
kill -HUP $server; load -k -n 500 -c 10 $url/proxied/deep/; load -n 20 -c 2 $url/gone
python3 - "$url" <<'PYTHON'
import gzip, hashlib, sys, urllib.request
fetch = lambda path, **headers: urllib.request.urlopen(urllib.request.Request(sys.argv[1] + path, headers=headers))
large = fetch('/large.txt').read(); print(hashlib.sha256(large).hexdigest())
print(gzip.decompress(fetch('/large.txt', **{'Accept-Encoding': 'gzip'}).read()) == large)
part = fetch('/large.txt', Range='bytes=1000-1999'); print(part.status, part.read() == large[1000:2000])
PYTHON
kill -QUIT $server; wait $server; echo "ended $?"
grep -c small.html access.log; grep -c large.txt access.log; grep -c 'GET /gone' access.log; cut -d'"' -f3 access.log | cut -d' ' -f2 | sort | uniq -c; cat error.log
