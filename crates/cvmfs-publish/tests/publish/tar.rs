//! Archives written byte by byte, so that they can also be wrong.

/// A tar archive in the making.
#[derive(Debug, Default, Clone)]
pub struct Tar(Vec<u8>);

/// One header; the rest are zero bytes.
#[derive(Debug, Clone)]
pub struct Header<'a> {
    pub name: &'a [u8],
    pub kind: u8,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: i64,
    pub link: &'a [u8],
    pub device: (u32, u32),
    pub xattrs: &'a [(Vec<u8>, Vec<u8>)],
    pub nanoseconds: u32,
}

impl<'a> Header<'a> {
    pub fn new(name: &'a [u8], kind: u8, mode: u32) -> Header<'a> {
        Header {
            name,
            kind,
            mode,
            uid: 0,
            gid: 0,
            mtime: 1_600_000_000,
            link: b"",
            device: (0, 0),
            xattrs: &[],
            nanoseconds: 0,
        }
    }
}

impl Tar {
    pub fn dir(self, name: &str, mode: u32) -> Tar {
        self.add(&Header::new(format!("{name}/").as_bytes(), b'5', mode), b"")
    }

    pub fn file(self, name: &str, content: &[u8]) -> Tar {
        self.add(&Header::new(name.as_bytes(), b'0', 0o644), content)
    }

    pub fn link(self, kind: u8, name: &str, target: &str) -> Tar {
        self.add(&Header { link: target.as_bytes(), ..Header::new(name.as_bytes(), kind, 0o777) }, b"")
    }

    /// Adds an entry; what a plain header cannot hold goes into PAX records.
    pub fn add(mut self, header: &Header<'_>, content: &[u8]) -> Tar {
        let mut pax = Vec::new();
        let plain = |bytes: &[u8]| bytes.len() <= 100 && bytes.is_ascii();
        if !plain(header.name) {
            record(&mut pax, b"path", header.name);
        }
        if !plain(header.link) {
            record(&mut pax, b"linkpath", header.link);
        }
        if header.mtime < 0 || header.mtime >= 1 << 33 || header.nanoseconds > 0 {
            // a negative time with a fraction counts down from the next second
            let text = match (header.mtime, header.nanoseconds) {
                (seconds, 0) => seconds.to_string(),
                (seconds, ns) if seconds >= 0 => format!("{seconds}.{ns:09}"),
                (-1, ns) => format!("-0.{:09}", 1_000_000_000 - ns),
                (seconds, ns) => format!("{}.{:09}", seconds + 1, 1_000_000_000 - ns),
            };
            record(&mut pax, b"mtime", text.as_bytes());
        }
        for (key, id) in [(&b"uid"[..], header.uid), (b"gid", header.gid)] {
            if id >= 1 << 21 {
                record(&mut pax, key, id.to_string().as_bytes());
            }
        }
        for (name, value) in header.xattrs {
            record(&mut pax, &[b"SCHILY.xattr.", name.as_slice()].concat(), value);
        }
        if !pax.is_empty() {
            self.block(&Header::new(b"pax", b'x', 0o644), &pax);
        }
        self.block(header, content);
        self
    }

    /// The archive with its two zero blocks.
    pub fn finish(mut self) -> Vec<u8> {
        self.0.extend_from_slice(&[0; 1024]);
        self.0
    }

    fn block(&mut self, header: &Header<'_>, content: &[u8]) {
        let mut block = [0u8; 512];
        let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &header.name[..header.name.len().min(100)]);
        put(100, format!("{:07o}", header.mode).as_bytes());
        let id = |id: u32| format!("{:07o}", if id < 1 << 21 { id } else { 0 });
        put(108, id(header.uid).as_bytes());
        put(116, id(header.gid).as_bytes());
        put(124, format!("{:011o}", content.len()).as_bytes());
        let mtime = if (0..1 << 33).contains(&header.mtime) { header.mtime } else { 0 };
        put(136, format!("{mtime:011o}").as_bytes());
        put(156, &[header.kind]);
        put(157, &header.link[..header.link.len().min(100)]);
        put(257, b"ustar\x0000");
        put(329, format!("{:07o}", header.device.0).as_bytes());
        put(337, format!("{:07o}", header.device.1).as_bytes());
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|&b| u32::from(b)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.0.extend_from_slice(&block);
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
    }
}

fn record(pax: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    pax.extend_from_slice(length.to_string().as_bytes());
    pax.push(b' ');
    pax.extend_from_slice(key);
    pax.push(b'=');
    pax.extend_from_slice(value);
    pax.push(b'\n');
}
