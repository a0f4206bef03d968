//! A web server's request: read in the process, in a process of its own, in a compartment.
//!
//! The client is a thread outside Dune mode everywhere, and is part of what is measured, as
//! are the kernel's sockets and the file that is sent. The server is one of two threads:
//!
//! ```text
//!   linux        no Dune at all
//!   fork         no Dune, a process for each request
//!   dune         outside Dune mode but for the time in which a compartment runs
//!   dune-mode    in Dune mode all along, no compartments
//!   dune-inside  in Dune mode all along, with compartments
//! ```

use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};

use dune_https::{Client, LOCALHOST, Parsing, Planted, Server, localhost_key};

use super::Bench;
use crate::meter::Figure;
use crate::report::{DUNE, LINUX, Row};

const FORK: &str = "fork";
const DUNE_MODE: &str = "dune-mode";
const DUNE_INSIDE: &str = "dune-inside";
/// Requests of a sample.
const REQUESTS: u32 = 16;
const BODY: usize = 1200;
/// What the compartments may add to the server without them.
const AIM: f64 = 1.1;

type Result<T> = core::result::Result<T, Box<dyn core::error::Error + Send + Sync>>;

/// Whether the connection is encrypted.
#[derive(Clone, Copy, Debug)]
enum Over {
    Tcp,
    Tls,
}

/// Where the server's thread runs.
#[derive(Clone, Copy, Debug)]
enum Mode {
    Outside,
    Inside,
}

/// A folder with a file in it, which goes with it.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Self> {
        let folder = Self(std::env::temp_dir().join(format!("http-{}", std::process::id())));
        std::fs::create_dir_all(&folder.0)?;
        std::fs::write(folder.0.join("index.html"), vec![b'x'; BODY])?;
        Ok(folder)
    }

    fn whole(&self, parsing: Parsing) -> Result<Server> {
        let key = localhost_key()?;
        Ok(Server::whole(
            LOCALHOST,
            key,
            parsing,
            Planted::No,
            &self.0,
        )?)
    }

    fn split(&self) -> Result<Server> {
        Ok(Server::split(
            LOCALHOST,
            localhost_key()?,
            Planted::No,
            &self.0,
        )?)
    }

    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(self.path());
    }
}

pub(super) fn plain_linux(bench: &Bench, row: &mut Row) {
    without_dune(bench, row, Over::Tcp);
}

pub(super) fn tls_linux(bench: &Bench, row: &mut Row) {
    without_dune(bench, row, Over::Tls);
}

fn without_dune(bench: &Bench, row: &mut Row, over: Over) {
    for (contender, make) in [
        (LINUX, (|| Parsing::InProcess) as fn() -> Parsing),
        (FORK, || Parsing::Processes),
    ] {
        let figure = Folder::new()
            .and_then(|folder| request(bench, folder.whole(make())?, over, Mode::Outside));
        match figure {
            Ok(figure) => row.add(contender, figure),
            Err(error) => row.note(format!("no figure for {contender}: {error}")),
        }
    }
}

pub(super) fn plain(bench: &Bench, row: &mut Row) {
    with_compartments(bench, row, Over::Tcp);
}

pub(super) fn tls(bench: &Bench, row: &mut Row) {
    with_compartments(bench, row, Over::Tls);
}

fn with_compartments(bench: &Bench, row: &mut Row, over: Over) {
    let measure = |row: &mut Row| -> Result<()> {
        dune_https::start()?;
        let folder = Folder::new()?;
        let whole = folder.whole(Parsing::InProcess)?;
        row.add(DUNE_MODE, request(bench, whole, over, Mode::Inside)?);
        for (contender, mode) in [(DUNE_INSIDE, Mode::Inside), (DUNE, Mode::Outside)] {
            let server = folder.whole(Parsing::in_compartments())?;
            row.add(contender, request(bench, server, over, mode)?);
        }
        Ok(())
    };
    if let Err(error) = measure(row) {
        row.set_missing(error.to_string());
        return;
    }
    if let (Some(linux), Some(fork), Some(dune)) =
        (row.median(LINUX), row.median(FORK), row.median(DUNE))
    {
        row.set_aim((linux * AIM).min(fork / 2.0));
        row.note(format!(
            "{:+.1}% over the server without compartments (aim: 10%); {:.1} times the throughput \
             of a process for each request (aim: 2)",
            (dune / linux - 1.0) * 100.0,
            fork / dune,
        ));
    }
    if let (Some(mode), Some(inside)) = (row.median(DUNE_MODE), row.median(DUNE_INSIDE)) {
        row.note(format!(
            "in Dune mode all along: {:+.1}% over the same without compartments",
            (inside / mode - 1.0) * 100.0,
        ));
    }
}

pub(super) fn split(bench: &Bench, row: &mut Row) {
    let measure = |row: &mut Row| -> Result<()> {
        dune_https::start()?;
        let folder = Folder::new()?;
        for (contender, mode) in [(DUNE_INSIDE, Mode::Inside), (DUNE, Mode::Outside)] {
            row.add(contender, request(bench, folder.split()?, Over::Tls, mode)?);
        }
        Ok(())
    };
    if let Err(error) = measure(row) {
        row.set_missing(error.to_string());
    }
    row.note("three runs of a compartment for each request");
}

/// What a request costs that follows others on its connection.
fn request(bench: &Bench, mut server: Server, over: Over, mode: Mode) -> Result<Figure> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let ours = TcpStream::connect(listener.local_addr()?)?;
    let (theirs, _) = listener.accept()?;
    for stream in [&ours, &theirs] {
        stream.set_nodelay(true)?;
    }
    std::thread::scope(|scope| {
        let serving = scope.spawn(move || {
            let mut serve = || match over {
                Over::Tcp => server.serve_plain(&theirs),
                Over::Tls => server.serve(&theirs),
            };
            match mode {
                Mode::Outside => serve(),
                Mode::Inside => dune::run(serve).map_err(std::io::Error::other)?,
            }
        });
        let mut tls = None;
        let mut tcp = None;
        match over {
            Over::Tcp => tcp = Some(Client::plain(&ours)),
            Over::Tls => tls = Some(Client::connect(&ours, LOCALHOST)?),
        }
        let mut failure = None;
        let mut get = || {
            let body = match (&mut tls, &mut tcp) {
                (Some(client), _) => client.get("/index.html"),
                (None, Some(client)) => client.get("/index.html"),
                (None, None) => return,
            };
            match body {
                Ok(body) if body.len() == BODY => {}
                Ok(body) => failure = Some(format!("{} bytes came", body.len())),
                Err(error) => failure = Some(error.to_string()),
            }
        };
        let figure = bench.meter.with_at_most(11).measure(REQUESTS, &mut get);
        ours.shutdown(std::net::Shutdown::Write)?;
        let served = serving.join().map_err(|_| "the server panicked")?;
        match failure {
            Some(failure) => Err(failure.into()),
            None => Ok(served.map(|_| figure)?),
        }
    })
}
