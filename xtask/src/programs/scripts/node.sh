# Workers, children, a cluster, an HTTP server with clients, files, compression, timers and signals in Node.
cat >main.js <<'END'
const { Worker, isMainThread, parentPort, workerData } = require('worker_threads');
const http = require('http'), fs = require('fs'), zlib = require('zlib'), crypto = require('crypto');
const { execFileSync, spawn, fork } = require('child_process'), { once } = require('events'), util = require('util');
if (!isMainThread) {
    const view = new Int32Array(workerData); let sum = 0;
    for (let i = 0; i < 20000; i++) { sum = (sum * 31 + i) | 0; Atomics.add(view, 0, 1); }
    parentPort.postMessage(sum); return;
}
if (process.argv[2] === 'child') { process.on('message', (n) => { process.send(n * n); process.disconnect(); }); return; }
(async () => {
    const shared = new SharedArrayBuffer(4);
    const sums = await Promise.all([1, 2, 3, 4].map(async () => (await once(new Worker(__filename, { workerData: shared }), 'message'))[0]));
    console.log('workers', sums, new Int32Array(shared)[0]);
    console.log('child', execFileSync('echo', ['spawned']).toString().trim());
    const child = spawn('sh', ['-c', 'cat; echo error >&2; exit 3']); let said = ''; child.stdout.on('data', (d) => said += d); child.stderr.on('data', (d) => said += d);
    child.stdin.end('piped\n'); console.log('spawn', (await once(child, 'close'))[0], said.split('\n').sort().join(' '));
    const forked = fork(__filename, ['child']); forked.send(12); console.log('fork', (await once(forked, 'message'))[0]); await once(forked, 'exit');
    const server = http.createServer((req, res) => { let body = ''; req.on('data', (d) => body += d); req.on('end', () => res.end(req.url + body.toUpperCase())); });
    await new Promise((done) => server.listen(0, '127.0.0.1', done));
    const ask = (n) => new Promise((done) => { const req = http.request({ port: server.address().port, method: 'POST', path: '/' + n, agent }, (res) => { let text = ''; res.on('data', (d) => text += d); res.on('end', () => done(text)); }); req.end('x' + n); });
    const agent = new http.Agent({ keepAlive: true, maxSockets: 8 }); const answers = await Promise.all(Array.from({ length: 200 }, (_, n) => ask(n)));
    console.log('http', answers.every((text, n) => text === `/${n}X${n}`)); agent.destroy(); server.close();
    const data = crypto.createHash('sha256').update('seed').digest('hex').repeat(5000);
    console.log('zlib', zlib.gunzipSync(zlib.gzipSync(data)).toString() === data, (await util.promisify(zlib.brotliCompress)(data)).length < 1000);
    console.log('crypto', (await util.promisify(crypto.scrypt)('key', 'salt', 32)).toString('hex'), crypto.createHmac('sha512', 'k').update(data).digest('base64').slice(0, 20));
    fs.writeFileSync('file', data); console.log('files', fs.statSync('file').size, (await fs.promises.readFile('file', 'utf8')) === data, fs.readdirSync('.').sort().join());
    let caught = 0; process.on('SIGUSR2', () => caught++); for (let i = 0; i < 5; i++) { process.kill(process.pid, 'SIGUSR2'); await new Promise((r) => setTimeout(r, 30)); } console.log('signals', caught);
    const fib = (n) => n < 2 ? n : fib(n - 1) + fib(n - 2); console.log('jit', fib(27)); const junk = []; for (let i = 0; i < 200; i++) junk[i % 20] = new Array(20000).fill(i); console.log('gc', junk.length);
    const add = await WebAssembly.instantiate(Uint8Array.from([0, 97, 115, 109, 1, 0, 0, 0, 1, 7, 1, 96, 2, 127, 127, 1, 127, 3, 2, 1, 0, 7, 7, 1, 3, 97, 100, 100, 0, 0, 10, 9, 1, 7, 0, 32, 0, 32, 1, 106, 11])); console.log('wasm', add.instance.exports.add(40, 2));
    process.exitCode = 6;
})();
END
node main.js; echo "ended $?"
node -e 'setTimeout(() => process.abort(), 10)' 2>/dev/null; echo "aborted $?"
