# Threads, processes, pools, an event loop, sockets, memory, files and signals in Python.
python3 - <<'PYTHON'
import asyncio, concurrent.futures, ctypes, hashlib, http.server, json, lzma, mmap, multiprocessing, os, queue, signal, sqlite3, subprocess, sys, tempfile, threading, urllib.request
def square(n): return n * n
if __name__ == '__main__':
    with concurrent.futures.ThreadPoolExecutor(8) as pool: print('threads', sum(pool.map(square, range(1000))))
    with multiprocessing.get_context('fork').Pool(3) as pool: print('processes', sum(pool.map(square, range(300))))
    shared = multiprocessing.get_context('fork').Value('i', 0)
    def add():
        for _ in range(200):
            with shared.get_lock(): shared.value += 1
    workers = [multiprocessing.get_context('fork').Process(target=add) for _ in range(3)]
    for w in workers: w.start()
    for w in workers: w.join()
    print('shared', shared.value, [w.exitcode for w in workers])
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = self.path.upper().encode(); self.send_response(200); self.send_header('Content-Length', str(len(body))); self.end_headers(); self.wfile.write(body)
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler); threading.Thread(target=server.serve_forever, daemon=True).start()
    print('http', sum(urllib.request.urlopen('http://127.0.0.1:%d/p%d' % (server.server_port, n)).read() == b'/P%d' % n for n in range(50))); server.shutdown()
    async def tool(n):
        process = await asyncio.create_subprocess_exec('sh', '-c', 'cat; exit %d' % n, stdin=-1, stdout=-1)
        out, _ = await process.communicate(b'x' * n); return len(out), process.returncode
    async def main(): print('asyncio', await asyncio.gather(*(tool(n) for n in range(6))))
    asyncio.run(main())
    data = json.dumps([{'n': n, 'h': hashlib.md5(b'%d' % n).hexdigest()} for n in range(3000)]).encode(); print('lzma', lzma.decompress(lzma.compress(data)) == data, hashlib.sha3_256(data).hexdigest()[:16])
    with sqlite3.connect(':memory:') as db: db.execute('create table t (n)'); db.executemany('insert into t values (?)', ((n,) for n in range(5000))); print('sqlite', db.execute('select sum(n), count(*) from t').fetchone())
    with tempfile.TemporaryFile() as file:
        file.truncate(1 << 20); m = mmap.mmap(file.fileno(), 1 << 20)
        if not (child := os.fork()): m[5:10] = b'child'; os._exit(0)
        os.waitpid(child, 0); print('mmap', m[5:10]); m.resize(1 << 21); print(len(m))
    got = []; [signal.signal(s, lambda s, f: got.append(s)) for s in (signal.SIGUSR1, signal.SIGRTMIN + 3)]
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGRTMIN + 3, signal.SIGUSR1]); [os.kill(os.getpid(), s) for s in (signal.SIGRTMIN + 3, signal.SIGUSR1) * 3]; signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGRTMIN + 3, signal.SIGUSR1]); print('signals', sorted(got))
    print(subprocess.run(['python3', '-c', 'import ctypes; ctypes.string_at(0)'], capture_output=True).returncode)
PYTHON
