//! Goal: nothing that a server says is believed unchecked, and a real one is understood.
//! Method: a server that follows a script, byte by byte, and Debian's qemu-nbd.

mod fake;

use self::fake::{Fake, chunk, data, status};
use super::{Client, NbdError, STATE_DIRTY, STATE_ZERO, Span, reply::ReadInFlight};
use std::{
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use tokio::net::UnixStream;

const ALLOCATION: &str = "base:allocation";

#[tokio::test]
async fn replies_may_come_in_any_order_and_in_pieces() {
    let (client, mut server) = Fake::serve(8192, &[]).await;
    let (one, two) = (client.read(0, 1024).await.unwrap(), client.read(4096, 1024).await.unwrap());
    let (first, second) = (server.request().await, server.request().await);
    assert_eq!((first.offset, second.offset, second.len), (0, 4096, 1024));
    server.send(&data(0, second.cookie, 4608, &[2; 512])).await;
    server.send(&data(1, first.cookie, 0, &[1; 1024])).await;
    let hole = [&4096u64.to_be_bytes()[..], &512u32.to_be_bytes()[..]].concat();
    server.send(&chunk(0, 2, second.cookie, &hole)).await;
    server.send(&chunk(1, 0, second.cookie, &[])).await;
    assert_eq!(one.wait().await.unwrap().unwrap(), vec![1; 1024]);
    assert_eq!(two.wait().await.unwrap().unwrap(), [[0; 512], [2; 512]].concat());
}

#[tokio::test]
async fn a_failed_request_leaves_the_connection_usable() {
    let (client, mut server) = Fake::serve(8192, &[]).await;
    let read = client.read(0, 512).await.unwrap();
    let request = server.request().await;
    server.send(&chunk(1, 0x8001, request.cookie, &[0, 0, 0, 28, 0, 4, b'f', b'u', b'l', b'l'])).await;
    let failed = read.wait().await.unwrap_err();
    assert!(matches!(&failed, NbdError::Failed { errno: 28, message } if message == "full"), "{failed}");
    let read = client.read(0, 512).await.unwrap();
    let request = server.request().await;
    server.send(&data(1, request.cookie, 0, &[3; 512])).await;
    assert_eq!(read.wait().await.unwrap().unwrap(), vec![3; 512]);
}

#[tokio::test]
async fn a_server_that_breaks_the_protocol_is_refused_and_every_request_told() {
    type Script = fn(u64) -> Vec<u8>;
    let scripts: [(&str, Script); 11] = [
        ("garbage", |_| vec![0xab; 64]),
        ("a foreign cookie", |cookie| data(1, cookie + 1000, 0, &[0; 512])),
        ("data before what was asked", |cookie| data(1, cookie, 0, &[0; 512])),
        ("data after what was asked", |cookie| data(1, cookie, 4608, &[0; 1024])),
        ("an offset that wraps", |cookie| data(1, cookie, u64::MAX, &[0; 512])),
        ("a read cut short", |cookie| data(1, cookie, 4096, &[0; 512])),
        ("nothing at all", |cookie| chunk(1, 0, cookie, &[])),
        ("a huge chunk", |cookie| {
            [&chunk(1, 1, cookie, &[])[..16], &u32::MAX.to_be_bytes(), &[0; 64]].concat()
        }),
        ("a status for a read", |cookie| status(cookie, 1, &[(512, 0)])),
        ("an overlap", |cookie| {
            [data(0, cookie, 4096, &[0; 512]), data(1, cookie, 4096, &[0; 1024])].concat()
        }),
        ("an error without words", |cookie| chunk(1, 0x8001, cookie, &[0; 3])),
    ];
    for (name, script) in scripts {
        let (client, mut server) = Fake::serve(1 << 20, &[]).await;
        let (read, other) = (client.read(4096, 1024).await.unwrap(), client.read(0, 512).await.unwrap());
        let request = server.request().await;
        server.send(&script(request.cookie)).await;
        for pending in [read, other] {
            let error = pending.wait().await.unwrap_err();
            assert!(matches!(error, NbdError::Protocol(_) | NbdError::Lost { .. }), "{name}: {error}");
        }
        assert!(client.read(0, 512).await.is_err(), "{name}: the connection is given up");
    }
}

#[tokio::test]
async fn block_status_ends_where_the_first_context_does_and_at_what_was_asked() {
    let (client, mut server) = Fake::serve(1 << 20, &["a:a", "b:b"]).await;
    let asked = tokio::spawn(async move { client.status(0, 8192).await });
    let request = server.request().await;
    server.send(&status(request.cookie, 2, &[(4096, 0), (1 << 19, 1)])).await; // more than was asked
    server.send(&status(request.cookie, 1, &[(512, 3), (1024, 0), (4096, 0)])).await; // less than was asked
    server.send(&chunk(1, 0, request.cookie, &[])).await;
    let span = |bytes, a, b| Span { bytes, flags: vec![a, b] };
    assert_eq!(asked.await.unwrap().unwrap(), [span(512, 3, 0), span(3584, 0, 0), span(1536, 0, 1)]);
}

#[tokio::test]
async fn malformed_block_status_is_refused() {
    for bad in [&[][..], &[(0, 0)], &[(512, 0), (0, 1)]] {
        let (client, mut server) = Fake::serve(1 << 20, &["a:a"]).await;
        let asked = tokio::spawn(async move { client.status(0, 8192).await });
        let request = server.request().await;
        server.send(&status(request.cookie, 1, bad)).await;
        assert!(matches!(asked.await.unwrap(), Err(NbdError::Protocol(_))), "{bad:?}");
    }
}

#[tokio::test]
async fn requests_outside_of_the_export_are_never_sent() {
    let (client, _server) = Fake::serve(8192, &[]).await;
    for (offset, len) in [(0, 0), (8192, 1), (8191, 2), (u64::MAX, 512), (0, super::REQUEST_MAX + 1)] {
        assert!(matches!(client.read(offset, len).await, Err(NbdError::OutOfRange { .. })));
    }
}

#[tokio::test]
async fn a_server_that_is_none_is_refused_in_the_handshake() {
    for greeting in [&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], b"NBDMAGICIHAVEOPT\0\0", b"NBDMAGIC"] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut server = Fake::on(theirs);
        server.send(greeting).await;
        drop(server);
        assert!(Client::open(ours, "vda", &[]).await.is_err());
    }
}

#[test]
fn a_read_is_complete_only_without_gaps() {
    let mut read = ReadInFlight::new(0, 2048);
    read.place(0, 512).unwrap();
    read.place(1024, 1024).unwrap();
    assert!(read.finish().is_err());
}

struct QemuNbd(Child);

impl QemuNbd {
    async fn serve(dir: &Path, format: &str, more: &[&str]) -> (Self, UnixStream) {
        let socket = dir.join("nbd");
        let mut command = Command::new("qemu-nbd");
        command
            .args(["--persistent", "--read-only", "-f", format, "-x", "vda", "-k"])
            .arg(&socket)
            .args(more);
        let server = Self(command.arg(dir.join("disk")).stdin(Stdio::null()).spawn().unwrap());
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match UnixStream::connect(&socket).await {
                Ok(stream) => return (server, stream),
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Drop for QemuNbd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn run(command: &str, arguments: &[&str], file: &Path) {
    assert!(
        Command::new(command).args(arguments).arg(file).stdout(Stdio::null()).status().unwrap().success()
    );
}

#[tokio::test]
async fn qemu_nbd_is_understood_with_allocation_and_a_dirty_bitmap() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    let make = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&disk).arg("64M").status();
    assert!(make.unwrap().success());
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 1M"], &disk);
    let bitmap =
        Command::new("qemu-img").args(["bitmap", "--add", "-g", "4096"]).arg(&disk).arg("mark").status();
    assert!(bitmap.unwrap().success());
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 2 64k 4k", "-c", "write -P 3 40M 8M"], &disk);
    let (_server, stream) = QemuNbd::serve(dir.path(), "qcow2", &["-B", "mark"]).await;
    let contexts = [ALLOCATION.to_owned(), "qemu:dirty-bitmap:mark".to_owned()];
    let client = Client::open(stream, "vda", &contexts).await.unwrap();
    assert_eq!(client.size(), 64 << 20);
    let (mut at, mut data, mut dirty) = (0, 0, 0);
    while at < client.size() {
        let spans =
            client.status(at, (client.size() - at).min(u64::from(super::REQUEST_MAX)) as u32).await.unwrap();
        assert!(!spans.is_empty());
        for span in spans {
            at += span.bytes;
            data += if span.flags[0] & STATE_ZERO == 0 { span.bytes } else { 0 };
            dirty += if span.flags[1] & STATE_DIRTY != 0 { span.bytes } else { 0 };
        }
    }
    assert_eq!((at, data, dirty), (64 << 20, 9 << 20, (8 << 20) + 4096));
    let mut reads = Vec::new();
    for at in (0..64u64 << 20).step_by(1 << 20) {
        reads.push((at, client.read(at, 1 << 20).await.unwrap()));
    }
    for (at, read) in reads {
        // QEMU does not send what it knows to be zero.
        let bytes = read.wait().await.unwrap().unwrap_or_else(|| vec![0; 1 << 20].into());
        let expected = if at == 0 {
            1
        } else if (40 << 20..48 << 20).contains(&at) {
            3
        } else {
            0
        };
        assert!(bytes[128 << 10..].iter().all(|byte| *byte == expected), "at {at}");
        assert_eq!(bytes[64 << 10], if at == 0 { 2 } else { expected });
    }
}

#[tokio::test]
async fn qemu_nbd_refuses_what_it_does_not_have_in_words() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("disk"), vec![0; 4096]).unwrap();
    let (_server, stream) = QemuNbd::serve(dir.path(), "raw", &[]).await;
    let error = Client::open(stream, "vdz", &[]).await.unwrap_err();
    assert!(matches!(&error, NbdError::Refused { what, .. } if what.contains("vdz")), "{error}");
    let stream = UnixStream::connect(dir.path().join("nbd")).await.unwrap();
    let error = Client::open(stream, "vda", &["qemu:dirty-bitmap:none".into()]).await.unwrap_err();
    assert!(error.to_string().contains("dirty-bitmap:none"), "{error}");
}
