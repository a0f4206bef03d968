//! Reading a request: what runs for each of them, on whatever the network sends.
#![expect(unsafe_code, reason = "the planted bug")]

/// The most of the body of a `TRACE` that is sent back, in bytes.
pub const LONGEST_ECHO: usize = 60_000;
/// The most that [`encode`] makes of a request.
pub(crate) const LONGEST_REQUEST: usize = LONGEST_ECHO + 2048;

/// What the server needs to know of a request.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) path: String,
    pub(crate) keep_alive: bool,
    /// The body of a `TRACE`, to be sent back.
    pub(crate) echo: Option<Vec<u8>>,
}

/// Reads a request, and writes down what it says in a form that can leave a compartment:
/// nothing if it is none. With `PLANTED`, the bug that is looked for: the length of the body
/// is believed.
pub(crate) fn encode<const PLANTED: bool>(input: &[u8]) -> Vec<u8> {
    let Some(request) = parse::<PLANTED>(input) else {
        return Vec::new();
    };
    let mut output = vec![1, u8::from(request.keep_alive)];
    output.extend_from_slice(&(request.path.len() as u16).to_le_bytes());
    output.extend_from_slice(request.path.as_bytes());
    if let Some(echo) = request.echo {
        output.push(1);
        output.extend_from_slice(&echo);
    }
    output
}

/// Reads what [`encode`] has written, or what somebody who took it over has.
pub(crate) fn decode(bytes: &[u8]) -> Option<Request> {
    let (&[1, keep_alive, low, high], rest) = bytes.split_first_chunk()? else {
        return None;
    };
    let (path, rest) = rest.split_at_checked(usize::from(u16::from_le_bytes([low, high])))?;
    Some(Request {
        path: String::from_utf8(path.to_vec()).ok()?,
        keep_alive: keep_alive == 1,
        echo: rest.split_first().map(|(_, echo)| echo.to_vec()),
    })
}

fn parse<const PLANTED: bool>(input: &[u8]) -> Option<Request> {
    let end = input.windows(4).position(|four| four == b"\r\n\r\n")?;
    let head = core::str::from_utf8(input.get(..end)?).ok()?;
    let body = input.get(end + 4..)?;
    let mut lines = head.split("\r\n");
    let mut first = lines.next()?.split(' ');
    let (method, path, version) = (first.next()?, first.next()?, first.next()?);
    if version != "HTTP/1.1" || !path.starts_with('/') || path.len() > 1024 {
        return None;
    }
    let mut request = Request {
        path: path.to_owned(),
        keep_alive: true,
        echo: None,
    };
    let mut length = 0;
    for line in lines {
        let (name, value) = line.split_once(':')?;
        if name.eq_ignore_ascii_case("connection") {
            request.keep_alive = !value.trim().eq_ignore_ascii_case("close");
        } else if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse().ok().filter(|n| *n <= LONGEST_ECHO)?;
        }
    }
    match method {
        "GET" => {}
        "TRACE" => request.echo = Some(body_of::<PLANTED>(body, length)?),
        _ => return None,
    }
    Some(request)
}

fn body_of<const PLANTED: bool>(body: &[u8], length: usize) -> Option<Vec<u8>> {
    if PLANTED {
        let from = body.as_ptr();
        // SAFETY: none. Nobody looked whether so much has come.
        let byte = |index| unsafe { from.wrapping_add(index).read_volatile() };
        return Some((0..length).map(byte).collect());
    }
    body.get(..length).map(<[u8]>::to_vec)
}
