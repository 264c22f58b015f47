//! A test guest on paper: memory, disks, how busy it is; and the libvirt XML that says so.
//! Paths in it are the site's own, the same at every site. Called by `guest` and the tests.

use std::fmt::{self, Write};

use uuid::Uuid;

use crate::accel::Accel;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskFormat {
    Raw,
    Qcow2,
}

impl fmt::Display for DiskFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskSpec {
    pub format: DiskFormat,
    pub size_mib: u64,
}

/// What to start. The defaults are a small, moderately busy guest without disks.
#[derive(Clone, Debug)]
pub struct GuestSpec {
    pub name: String,
    pub uuid: Uuid,
    pub memory_mib: u64,
    pub disks: Vec<DiskSpec>,
    pub machine: String,
    pub tick_ms: u64,
    pub pattern_mib: u64,
    pub dirty_kib: u64,
    pub disk_writes: u64,
    pub fill_mib: u64,
    pub idle: bool,
    /// Whether a guest agent runs in it.
    pub agent: bool,
    /// Which of its disks has a file system, to which it writes lines that nobody syncs.
    pub files: Option<usize>,
    /// Further elements of its XML.
    pub more: String,
    /// Further words of the kernel's command line.
    pub arguments: String,
}

impl GuestSpec {
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            uuid: Uuid::new_v4(),
            memory_mib: 160,
            disks: Vec::new(),
            machine: "pc".to_owned(),
            tick_ms: 100,
            pattern_mib: 24,
            dirty_kib: 256,
            disk_writes: 4,
            fill_mib: 0,
            idle: false,
            agent: false,
            files: None,
            more: String::new(),
            arguments: String::new(),
        }
    }

    /// All of its memory; at least 128 more than pattern and filling.
    pub fn memory_mib(mut self, mib: u64) -> Self {
        self.memory_mib = mib;
        self
    }

    pub fn disk(mut self, format: DiskFormat, size_mib: u64) -> Self {
        self.disks.push(DiskSpec { format, size_mib });
        self
    }

    /// `pc` or `q35`, or any machine QEMU has.
    pub fn machine(mut self, machine: &str) -> Self {
        machine.clone_into(&mut self.machine);
        self
    }

    pub fn tick_ms(mut self, ms: u64) -> Self {
        self.tick_ms = ms;
        self
    }

    /// Memory that is patterned, changed and checked.
    pub fn pattern_mib(mut self, mib: u64) -> Self {
        self.pattern_mib = mib;
        self
    }

    /// Memory given a new content each tick.
    pub fn dirty_kib(mut self, kib: u64) -> Self {
        self.dirty_kib = kib;
        self
    }

    /// 4 KiB blocks written to each disk each tick.
    pub fn disk_writes(mut self, blocks: u64) -> Self {
        self.disk_writes = blocks;
        self
    }

    /// Memory filled once and left alone.
    pub fn fill_mib(mut self, mib: u64) -> Self {
        self.fill_mib = mib;
        self
    }

    /// Changes nothing, but goes on ticking and checking.
    pub fn idle(mut self) -> Self {
        self.idle = true;
        self
    }

    /// Debian's guest agent runs in it.
    pub fn agent(mut self) -> Self {
        self.agent = true;
        self
    }

    /// One more disk, raw, with a file system to which it writes lines that nobody syncs: they are on that disk only if
    /// the guest agent, which it has too, froze it.
    pub fn files(mut self, mib: u64) -> Self {
        self.files = Some(self.disks.len());
        self.agent().disk(DiskFormat::Raw, mib)
    }

    /// Further elements of its XML (`<memoryBacking>`, say).
    pub fn more(mut self, xml: &str) -> Self {
        self.more.push_str(xml);
        self
    }

    /// One more network card that the guest has a driver for; `end` is where its cable leads, in libvirt's words.
    pub fn card(self, mac: &str, end: &str) -> Self {
        let card = format!("<interface {end}<mac address='{mac}'/><model type='virtio'/></interface>");
        self.argument("lb.net=1").more(&format!("<devices>{card}</devices>"))
    }

    /// Its QEMU runs as root, which may write-protect memory whatever the host's kernel allows to others.
    pub fn as_root(self) -> Self {
        self.more("<seclabel type='static' model='dac' relabel='yes'><label>+0:+0</label></seclabel>")
    }

    /// One more word for the kernel's command line.
    pub fn argument(mut self, word: &str) -> Self {
        self.arguments.push(' ');
        self.arguments.push_str(word);
        self
    }

    /// Where the site keeps a disk of this guest.
    pub fn disk_path(&self, at: usize) -> String {
        let format = self.disks.get(at).map_or(DiskFormat::Raw, |disk| disk.format);
        format!("/var/lib/libvirt/images/{}-{}.{format}", self.name, target(at))
    }

    /// Where the site keeps the console of a guest.
    pub fn console_path(name: &str) -> String {
        format!("/var/log/libvirt/qemu/{name}-console.log")
    }

    pub fn xml(&self, accel: Accel) -> String {
        let (name, uuid, memory, machine) = (&self.name, self.uuid, self.memory_mib, &self.machine);
        let (kind, console) = (accel.domain_type(), Self::console_path(name));
        let (initrd, channel) = if self.agent { ("agent-initrd", CHANNEL) } else { ("initrd", "") };
        let (cpu, arguments) = (if accel == Accel::Kvm { CPU } else { "" }, self.arguments());
        let (mut disks, more) = (String::new(), &self.more);
        for (at, disk) in self.disks.iter().enumerate() {
            let (format, path, target) = (disk.format, self.disk_path(at), target(at));
            let _ = write!(
                disks, // a String takes everything
                "<disk type='file' device='disk'>\
                 <driver name='qemu' type='{format}' cache='none' discard='unmap'/>\
                 <source file='{path}'/><target dev='{target}' bus='virtio'/></disk>\n    ",
            );
        }
        format!(
            "<domain type='{kind}'>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>{memory}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='{machine}'>hvm</type>
    <kernel>/var/lib/libvirt/boot/vmlinuz</kernel>
    <initrd>/var/lib/libvirt/boot/{initrd}</initrd>
    <cmdline>console=ttyS0 quiet panic=-1 {arguments}</cmdline>
  </os>
  <features><acpi/><apic/></features>
  {cpu}
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>restart</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    {disks}<serial type='file'><source path='{console}' append='on'/><target port='0'/></serial>
    {channel}<memballoon model='none'/>
  </devices>
  {more}
</domain>
"
        )
    }

    fn arguments(&self) -> String {
        format!(
            "lb.tick_ms={} lb.pattern_mib={} lb.dirty_kib={} lb.disk_writes={} lb.fill_mib={} lb.idle={} lb.agent={} \
             lb.files={}{}",
            self.tick_ms,
            self.pattern_mib,
            self.dirty_kib,
            self.disk_writes,
            self.fill_mib,
            u8::from(self.idle),
            u8::from(self.agent),
            self.files.map(target).unwrap_or_default(),
            self.arguments
        )
    }
}

/// What the host has, but no virtual machines in it: where the host is one itself, that is where it ends.
const CPU: &str = "<cpu mode='host-model'><feature policy='disable' name='svm'/></cpu>";

const CHANNEL: &str = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    ";

/// `vda`, `vdb`, …
fn target(at: usize) -> String {
    let letter = u8::try_from(at).ok().and_then(|at| b'a'.checked_add(at)).filter(u8::is_ascii_lowercase);
    format!("vd{}", char::from(letter.unwrap_or(b'z')))
}
