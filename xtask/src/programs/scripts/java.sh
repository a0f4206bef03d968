# Threads, locks, garbage under pressure by three collectors, an HTTP server with clients, children, files, exceptions in Java.
cat >Main.java <<'END'
import com.sun.net.httpserver.HttpServer;
import java.net.*; import java.net.http.*; import java.nio.channels.FileChannel; import java.nio.file.*; import java.util.*; import java.util.concurrent.*; import java.util.stream.*;
public class Main {
    record Point(int x, int y) {}
    static int depth(int n) { return n + depth(n + 1); }
    public static void main(String[] args) throws Exception {
        var pool = Executors.newFixedThreadPool(8); var counts = new ConcurrentHashMap<Integer, Integer>();
        var futures = IntStream.range(0, 64).mapToObj(n -> pool.submit(() -> { for (int i = 0; i < 500; i++) counts.merge(i % 17, 1, Integer::sum); return n; })).toList();
        int sum = 0; for (var future : futures) sum += future.get(); System.out.println("pool " + sum + " " + new TreeMap<>(counts));
        System.out.println("streams " + LongStream.rangeClosed(1, 300_000).parallel().map(n -> n * n % 1_000_003).sum());
        var garbage = new ArrayDeque<byte[]>(); long bytes = 0; for (int i = 0; i < 3000; i++) { garbage.add(new byte[64 << 10]); bytes += garbage.getLast().length; if (garbage.size() > 200) garbage.removeFirst(); } System.out.println("garbage " + bytes);
        try { depth(0); } catch (StackOverflowError error) { System.out.println("stack overflow caught"); }
        try { var all = new ArrayList<long[]>(); while (true) all.add(new long[1 << 20]); } catch (OutOfMemoryError error) { System.out.println("out of memory caught"); }
        Object none = args.length > 5 ? "" : null; int caught = 0; for (int i = 0; i < 20000; i++) try { none.hashCode(); } catch (NullPointerException e) { caught++; } System.out.println("null " + caught);
        var server = HttpServer.create(new InetSocketAddress("127.0.0.1", 0), 0); server.setExecutor(pool);
        server.createContext("/", exchange -> { var body = exchange.getRequestURI().getPath().toUpperCase().getBytes(); exchange.sendResponseHeaders(200, body.length); try (var out = exchange.getResponseBody()) { out.write(body); } }); server.start();
        var client = HttpClient.newHttpClient(); var base = "http://127.0.0.1:" + server.getAddress().getPort();
        var answers = IntStream.range(0, 60).mapToObj(n -> client.sendAsync(HttpRequest.newBuilder(URI.create(base + "/page" + n)).build(), HttpResponse.BodyHandlers.ofString())).toList();
        int right = 0; for (int n = 0; n < 60; n++) if (answers.get(n).get().body().equals("/PAGE" + n)) right++; System.out.println("http " + right); server.stop(0);
        var process = new ProcessBuilder("sh", "-c", "cat; exit 4").start(); process.getOutputStream().write("piped".getBytes()); process.getOutputStream().close(); System.out.println("child " + new String(process.getInputStream().readAllBytes()) + " " + process.waitFor());
        var path = Path.of("mapped"); try (var file = FileChannel.open(path, StandardOpenOption.CREATE, StandardOpenOption.READ, StandardOpenOption.WRITE)) { var map = file.map(FileChannel.MapMode.READ_WRITE, 0, 1 << 20); for (int i = 0; i < 1 << 20; i += 4096) map.putInt(i, i); map.force(); } System.out.println("file " + Files.size(path) + " " + Arrays.hashCode(Files.readAllBytes(path)));
        var lock = new Object(); int[] turns = {0}; var threads = IntStream.range(0, 2).mapToObj(me -> new Thread(() -> { for (int i = 0; i < 500; i++) synchronized (lock) { try { while (turns[0] % 2 != me) lock.wait(); } catch (InterruptedException e) { return; } turns[0]++; lock.notifyAll(); } })).toList(); for (var t : threads) t.start(); for (var t : threads) t.join(); System.out.println("turns " + turns[0]);
        var sleeper = new Thread(() -> { try { Thread.sleep(100_000); } catch (InterruptedException e) { System.out.println("interrupted"); } }); sleeper.start(); sleeper.interrupt(); sleeper.join();
        System.out.println(new Point(1, 2) + " " + "%08.3f".formatted(Math.PI)); pool.shutdown(); Runtime.getRuntime().addShutdownHook(new Thread(() -> System.out.println("hook"))); System.exit(5);
    }
}
END
javac -J-Xmx256m Main.java && for collector in Serial Parallel G1; do echo "$collector"; java -Xmx96m -XX:+Use${collector}GC Main; echo "ended $?"; done
java -Xint -Xmx96m -version 2>&1 | sed 1q | cut -d'"' -f1
