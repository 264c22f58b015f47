//! Points of a real database at work: SQLite, driven by Python, which this process looks at between batches of
//! transactions. Memory is the program's own and its files' pages, as a guest's page cache holds them; the disk is the
//! files. What changed is found page by page, as an engine finds it.

use anyhow::{Context, Result};
use bytes::{Bytes, BytesMut};
use lifeboat::{
    format::manifest::{Image, ImageKind},
    page::{Content, GROUP_PAGES, PAGE, PageGroup, PageRun, is_zero},
};
use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    io::{BufRead, BufReader, Write},
    os::unix::fs::FileExt,
    path::Path,
    process::{Child, Command, Stdio},
};

pub const WHAT: &str = "SQLite, 1000 transactions a point over 100,000 accounts, 12 points";

/// What changed since the point before, in page order.
pub struct Changed {
    pub images: Vec<Image>,
    ram: BTreeMap<u64, Bytes>,
    disk: BTreeMap<u64, Bytes>,
}

impl Changed {
    pub fn bytes(&self) -> u64 {
        ((self.ram.len() + self.disk.len()) * PAGE) as u64
    }

    pub fn disk_bytes(&self) -> u64 {
        (self.disk.len() * PAGE) as u64
    }

    pub fn pages(&self) -> impl Iterator<Item = &Bytes> {
        self.disk.values().chain(self.ram.values())
    }

    /// Image and number of each of [`Self::pages`].
    pub fn places(&self) -> impl Iterator<Item = (u16, u64)> {
        let of = |image: u16| move |page: &u64| (image, *page);
        self.disk.keys().map(of(DISK)).chain(self.ram.keys().map(of(RAM)))
    }

    /// Disks first, as the agent hands them over.
    pub fn groups(&self) -> impl Iterator<Item = PageGroup> {
        let of = |image: u16, pages: &BTreeMap<u64, Bytes>| {
            let pages: Vec<_> = pages.iter().map(|(no, page)| (*no, page.clone())).collect();
            let groups = pages.chunks(GROUP_PAGES).map(move |pages| {
                let (mut runs, mut raw) = (Vec::new(), BytesMut::new());
                for (no, page) in pages {
                    PageRun::push_page(&mut runs, *no);
                    raw.extend_from_slice(page);
                }
                PageGroup { image, runs, content: Content::Bytes(raw.freeze()) }
            });
            groups.collect::<Vec<_>>()
        };
        of(DISK, &self.disk).into_iter().chain(of(RAM, &self.ram))
    }
}

/// Lets the database work and takes its points.
pub fn points(folder: &Path) -> Result<Vec<Changed>> {
    let file = folder.join("bank.db");
    let mut database = Command::new("python3")
        .args(["-c", PROGRAM])
        .arg(&file)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("starting python3")?;
    let taken = take(&mut database, &file);
    let _ = database.kill();
    database.wait().context("waiting for python3")?;
    taken
}

fn take(database: &mut Child, file: &Path) -> Result<Vec<Changed>> {
    let mut orders = database.stdin.take().context("its input")?;
    let mut answers = BufReader::new(database.stdout.take().context("its output")?).lines();
    let mut before = Seen::default();
    let mut points = Vec::new();
    for no in 0..POINTS {
        answers.next().context("python3 ended early; does it have its module sqlite3?")??;
        let (mut ram, mut disk) = (BTreeMap::new(), BTreeMap::new());
        before.memory(database.id(), &mut ram)?;
        let mut wal = file.as_os_str().to_owned();
        wal.push("-wal");
        for (number, path) in (1..).zip([file, Path::new(&wal)]) {
            before.file(number, path, &mut ram, &mut disk)?;
        }
        let image = |no, kind, name: &str| Image {
            no,
            kind,
            name: name.into(),
            bytes: 1 << 55,
            full: points.is_empty(),
        };
        let images = vec![image(RAM, ImageKind::Ram, "pc.ram"), image(DISK, ImageKind::Disk, "vda")];
        points.push(Changed { images, ram, disk });
        if no + 1 < POINTS {
            writeln!(orders, "{TRANSACTIONS}").context("python3 takes no orders")?;
        }
    }
    Ok(points)
}

/// Pages as they were when they were last looked at.
#[derive(Default)]
struct Seen {
    memory: HashMap<u64, Bytes>,
    files: HashMap<(u64, u64), Bytes>,
}

impl Seen {
    /// The program's private memory; it waits for an order and changes nothing.
    fn memory(&mut self, pid: u32, ram: &mut BTreeMap<u64, Bytes>) -> Result<()> {
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
        let memory = File::open(format!("/proc/{pid}/mem"))?;
        for line in maps.lines().filter(|line| line.contains(" rw-p ")) {
            let range = line.split(' ').next().and_then(|range| range.split_once('-'));
            let (start, end) = range.context("a line of maps")?;
            let (start, end) = (u64::from_str_radix(start, 16)?, u64::from_str_radix(end, 16)?);
            let mut page = vec![0; PAGE];
            for at in (start..end).step_by(PAGE) {
                memory.read_exact_at(&mut page, at)?;
                changed(&mut self.memory, at / PAGE as u64, &page, |raw| {
                    ram.insert(at / PAGE as u64, raw);
                });
            }
        }
        Ok(())
    }

    /// A file, on the disk and in the page cache.
    fn file(
        &mut self,
        number: u64,
        path: &Path,
        ram: &mut BTreeMap<u64, Bytes>,
        disk: &mut BTreeMap<u64, Bytes>,
    ) -> Result<()> {
        let raw = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        for (no, page) in (0u64..).zip(raw.chunks_exact(PAGE)) {
            changed(&mut self.files, (number, no), page, |raw| {
                ram.insert(number << 40 | no, raw.clone());
                disk.insert(number << 30 | no, raw);
            });
        }
        Ok(())
    }
}

fn changed<K: std::hash::Hash + Eq>(
    seen: &mut HashMap<K, Bytes>,
    key: K,
    page: &[u8],
    each: impl FnOnce(Bytes),
) {
    let same = seen.get(&key).map_or_else(|| is_zero(page), |before| before == page);
    if !same {
        let page = Bytes::copy_from_slice(page);
        seen.insert(key, page.clone());
        each(page);
    }
}

const RAM: u16 = 0;
const DISK: u16 = 1;
const POINTS: usize = 13;
const TRANSACTIONS: u32 = 1000;
const PROGRAM: &str = r#"
import random, sqlite3, sys
random.seed(1)
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.executescript("""
    pragma page_size = 4096; pragma journal_mode = wal; pragma synchronous = off; pragma cache_size = -32000;
    create table account (id integer primary key, owner text, balance integer, touched integer);
    create table history (id integer primary key, account integer, amount integer, note text);
    create index by_account on history (account);
""")
db.execute("begin")
for no in range(100000):
    db.execute("insert into account values (?, ?, ?, 0)", (no, "owner %d of an account" % no, random.randrange(10**6)))
db.execute("commit")
print("ready", flush=True)
for line in sys.stdin:
    for _ in range(int(line)):
        account = min(random.randrange(100000), random.randrange(100000))
        amount = random.randrange(-500, 500)
        db.execute("begin")
        db.execute("update account set balance = balance + ?, touched = touched + 1 where id = ?", (amount, account))
        db.execute("insert into history (account, amount, note) values (?, ?, ?)", (account, amount, "by card %016x" % random.getrandbits(64)))
        db.execute("commit")
    print("done", flush=True)
"#;
