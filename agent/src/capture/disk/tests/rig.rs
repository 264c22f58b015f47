//! A QEMU without an operating system, its monitor over a plain socket, and a guest's writes done through its devices.

use crate::capture::disk::{DiskError, DiskTarget, Disks};
use lifeboat::{
    hypervisor::monitor::{Monitor, MonitorError, read_reply},
    id::{PointId, VmId},
    page::{Content, PAGE},
};
use serde_json::{Value, json};
use std::{
    fs,
    io::{BufRead, BufReader, IoSlice, Write},
    os::{
        fd::{AsRawFd, BorrowedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

pub const MIB: u64 = 1 << 20;

pub struct Qmp(Mutex<BufReader<UnixStream>>);

impl Qmp {
    pub fn connect(path: &Path) -> Self {
        let deadline = Instant::now() + Duration::from_secs(20);
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) => assert!(Instant::now() < deadline, "no monitor: {error}"),
            }
            thread::sleep(Duration::from_millis(5));
        };
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let qmp = Self(Mutex::new(BufReader::new(stream)));
        qmp.execute("qmp_capabilities", json!({})).unwrap();
        qmp
    }
}

impl Qmp {
    /// No monitor: to let go of the one before.
    pub fn placeholder() -> Self {
        Self(Mutex::new(BufReader::new(UnixStream::pair().unwrap().0)))
    }
}

impl Monitor for Qmp {
    fn execute_with_fds(
        &self,
        command: &str,
        arguments: Value,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Value, MonitorError> {
        let gone = |reason: String| MonitorError::Unreachable { command: command.into(), reason };
        let mut connection = self.0.lock().unwrap();
        let request = json!({ "execute": command, "arguments": arguments }).to_string();
        let raw: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [nix::sys::socket::ControlMessage::ScmRights(&raw)];
        let rights = if raw.is_empty() { &rights[..0] } else { &rights[..] };
        let fd = connection.get_ref().as_raw_fd();
        let flags = nix::sys::socket::MsgFlags::MSG_NOSIGNAL;
        let sent =
            nix::sys::socket::sendmsg::<()>(fd, &[IoSlice::new(request.as_bytes())], rights, flags, None)
                .map_err(|error| gone(error.to_string()))?;
        connection
            .get_mut()
            .write_all(&request.as_bytes()[sent..])
            .map_err(|error| gone(error.to_string()))?;
        loop {
            let mut line = String::new();
            match connection.read_line(&mut line) {
                Ok(0) => return Err(gone("QEMU hung up".into())),
                Ok(_) => {}
                Err(error) => return Err(gone(error.to_string())),
            }
            let reply: Value = serde_json::from_str(&line).unwrap();
            if reply.get("return").is_some() || reply.get("error").is_some() {
                return read_reply(command, &line);
            }
        }
    }
}

/// A disk of the rig: id of its device, format, bytes.
pub struct Given(pub &'static str, pub &'static str, pub u64);

pub struct Rig {
    pub dir: tempfile::TempDir,
    pub monitor: Arc<Qmp>,
    qemu: Child,
    pub targets: Vec<DiskTarget>,
}

impl Rig {
    /// Raw disks are virtio-blk, qcow2 disks are SCSI.
    pub fn new(disks: &[Given]) -> Self {
        Self::threaded(disks, "")
    }

    /// With `more` on the virtio devices.
    pub fn threaded(disks: &[Given], more: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("scratch")).unwrap();
        let mut command = Command::new("stdbuf");
        command.args([
            "-oL",
            "qemu-system-x86_64",
            "-accel",
            "tcg",
            "-display",
            "none",
            "-machine",
            "q35",
            "-nodefaults",
        ]);
        command.args([
            "-m",
            "32",
            "-S",
            "-object",
            "iothread,id=io0",
            "-device",
            &format!("virtio-scsi-pci,id=scsi0{more}"),
        ]);
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", dir.path().join("qmp").display()));
        for Given(id, format, bytes) in disks {
            let file = dir.path().join(id);
            image(format, &file, *bytes);
            let file = file.display();
            let device = if *format == "raw" { "virtio-blk-pci" } else { "scsi-hd" };
            command.arg("-blockdev").arg(format!(
                "driver={format},node-name=node-{id},discard=unmap,file.driver=file,file.discard=unmap,file.filename={file}"
            ));
            command
                .arg("-device")
                .arg(format!("{device},id={id},drive=node-{id}{}", if *format == "raw" { more } else { "" }));
        }
        let output = fs::File::create(dir.path().join("output")).unwrap();
        command.stdin(Stdio::null()).stderr(output.try_clone().unwrap()).stdout(output);
        let qemu = command.spawn().unwrap();
        let monitor = Arc::new(Qmp::connect(&dir.path().join("qmp")));
        monitor.execute("cont", json!({})).unwrap();
        let targets =
            disks.iter().map(|Given(id, ..)| DiskTarget { target: (*id).into(), alias: (*id).into() });
        Self { dir, monitor, qemu, targets: targets.collect() }
    }

    pub fn scratch(&self) -> PathBuf {
        self.dir.path().join("scratch")
    }

    pub fn disks(&self) -> Disks {
        self.disks_at(self.scratch())
    }

    pub fn disks_at(&self, scratch: PathBuf) -> Disks {
        self.try_disks(&self.targets, scratch).unwrap()
    }

    pub fn try_disks(&self, targets: &[DiskTarget], scratch: PathBuf) -> Result<Disks, DiskError> {
        Disks::attach(self.monitor.clone(), VmId::from_bytes([1; 16]), targets, scratch)
    }

    pub fn qmp(&self, command: &str, arguments: Value) -> Value {
        self.monitor.execute(command, arguments).unwrap()
    }

    /// What the guest does to its disk, through its device; it must succeed.
    pub fn guest(&self, id: &str, command: &str) {
        let said = self.guest_tries(id, command);
        assert!(!said.contains("failed") && !said.contains("rror"), "guest's `{command}` on {id}: {said}");
        assert_eq!(self.qmp("query-status", json!({}))["status"], "running");
    }

    pub fn guest_tries(&self, id: &str, command: &str) -> String {
        let devices = self.qmp("query-block", json!({}));
        let mut qdevs = devices.as_array().unwrap().iter().filter_map(|device| device["qdev"].as_str());
        let qdev = qdevs.find(|qdev| qdev.split('/').any(|part| part == id)).unwrap();
        let before = fs::read_to_string(self.dir.path().join("output")).unwrap().len();
        let answer = self.monitor.human(&format!("qemu-io -d {qdev} \"{command}\"")).unwrap();
        let said = fs::read_to_string(self.dir.path().join("output")).unwrap();
        format!("{answer}{}", &said[before..])
    }

    /// Cuts a point as the agent does.
    pub fn cut(&self, disks: &mut Disks, point: PointId, basis: Option<PointId>) {
        self.cut_over(disks, point, basis.as_slice());
    }

    /// As `cut`, while points are under way: the last of `over` is the basis.
    pub fn cut_over(&self, disks: &mut Disks, point: PointId, over: &[PointId]) {
        disks.recover(over).unwrap();
        disks.prepare(point).unwrap();
        self.mark(disks);
    }

    pub fn mark(&self, disks: &mut Disks) {
        self.qmp("stop", json!({}));
        self.qmp("transaction", json!({ "actions": disks.mark_actions() }));
        disks.marked();
        self.qmp("cont", json!({}));
    }

    /// Reads all views into `held`, what the site holds of each disk; returns bytes told.
    pub async fn read(&self, disks: &mut Disks, held: &mut Vec<Vec<u8>>) -> u64 {
        disks.open_views().await.unwrap();
        let images = disks.images();
        held.resize(images.len(), Vec::new());
        for (held, image) in held.iter_mut().zip(&images) {
            if image.full {
                held.clear();
            }
            held.resize(image.bytes.next_multiple_of(PAGE as u64) as usize, 0);
        }
        while let Some((index, runs, content)) = disks.next().await.unwrap() {
            let pages: Vec<u64> =
                runs.iter().flat_map(|run| run.first..run.first + u64::from(run.count)).collect();
            if let Content::Bytes(bytes) = &content {
                assert_eq!(bytes.len(), pages.len() * PAGE);
                assert!(pages.len() <= lifeboat::page::GROUP_PAGES && pages.is_sorted());
            }
            for (at, page) in pages.iter().enumerate() {
                let place = &mut held[index][*page as usize * PAGE..][..PAGE];
                match &content {
                    Content::Bytes(bytes) => place.copy_from_slice(&bytes[at * PAGE..][..PAGE]),
                    Content::Zero => place.fill(0),
                }
            }
        }
        disks.close_views().await.unwrap();
        disks.changed_bytes()
    }

    /// Everything of ours that is in QEMU.
    pub fn traces(&self) -> Vec<String> {
        let mut traces = Vec::new();
        for (command, arguments) in [
            ("query-named-block-nodes", json!({ "flat": true })),
            ("query-block", json!({})),
            ("query-block-exports", json!({})),
            ("query-fdsets", json!({})),
            ("query-block-jobs", json!({})),
        ] {
            let answer = self.qmp(command, arguments).to_string();
            if answer.contains("lifeboat") {
                traces.push(format!("{command}: {answer}"));
            }
        }
        let left = fs::read_dir(self.scratch()).unwrap().map(|entry| format!("{:?}", entry.unwrap().path()));
        traces.extend(left);
        traces
    }

    pub fn bitmaps(&self) -> usize {
        self.qmp("query-named-block-nodes", json!({ "flat": true })).to_string().matches("lifeboat-").count()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{}", fs::read_to_string(self.dir.path().join("output")).unwrap_or_default());
        }
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

pub fn image(format: &str, file: &Path, bytes: u64) {
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", format]).arg(file).arg(bytes.to_string());
    assert!(command.status().unwrap().success());
}

/// The point was sent and is durable.
pub async fn settle(disks: &mut Disks, point: PointId) {
    disks.sent(point).await.unwrap();
    disks.settle(point).await.unwrap();
}

pub fn point(no: u8) -> PointId {
    PointId::from_bytes([no; 16])
}

/// Whether bytes `from..to` of `held` are all `byte`.
pub fn all(held: &[u8], from: u64, to: u64, byte: u8) -> bool {
    held[from as usize..to as usize].iter().all(|found| *found == byte)
}
