//! What the replicas of a drill showed, kept beside its record: the end of each console, and a picture of each screen.
//! Promises: both are bounded; what can't be had is noted and fails nothing. Called by `run`.

use super::{
    record::{DrillMember, DrillRecord},
    run::Driller,
};
use crate::failover::error::FailoverError;
use lifeboat::hypervisor::libvirt::{Picture, XmlView};
use std::{
    fs,
    io::{self, Read, Seek, SeekFrom},
    path::Path,
};

/// Of a console its end is kept.
const CONSOLE_MAX: u64 = 256 << 10;

impl Driller {
    pub(super) async fn keep_evidence(&self, record: &mut DrillRecord) {
        let folder = self.book.folder(&record.id);
        for at in 0..record.members.len() {
            let place = record.isolated(&record.members[at]);
            let member = &mut record.members[at];
            let (vm, name) = (member.vm, member.name.clone());
            if member.running_ms.is_none() {
                continue;
            }
            let console = format!("console-{vm}.txt");
            match copy_end(&place.console(), &folder.join(&console)) {
                Ok(()) => member.console = Some(console),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    record.notes.push(format!("{name}: it has no serial console"));
                }
                Err(error) => record.notes.push(format!("{name}: its console could not be kept: {error}")),
            }
            match self.picture(&record.members[at]).await {
                Ok(Some(picture)) => {
                    let ending = if picture.kind == "image/png" { "png" } else { "ppm" };
                    let screen = format!("screen-{vm}.{ending}");
                    match fs::write(folder.join(&screen), picture.bytes) {
                        Ok(()) => record.members[at].screen = Some(screen),
                        Err(error) => {
                            record.notes.push(format!("{name}: its screen could not be kept: {error}"));
                        }
                    }
                }
                Ok(None) => {}
                Err(error) => record.notes.push(format!("{name}: no picture of its screen: {error}")),
            }
        }
    }

    /// Of a replica that has a screen and runs.
    async fn picture(&self, member: &DrillMember) -> Result<Option<Picture>, FailoverError> {
        let (replica, host) = (member.as_vm, self.runbook.hosts.at(member.host.as_ref())?);
        host.work(move |hypervisor| {
            let domain = hypervisor.domain_by_uuid(replica)?;
            let has_screen = domain.xml(XmlView::Active)?.contains("<video>");
            if has_screen { Ok(Some(domain.picture()?)) } else { Ok(None) }
        })
        .await
    }
}

fn copy_end(from: &Path, to: &Path) -> io::Result<()> {
    let mut file = fs::File::open(from)?;
    let skipped = file.metadata()?.len().saturating_sub(CONSOLE_MAX);
    file.seek(SeekFrom::Start(skipped))?;
    let mut bytes = Vec::new();
    file.take(CONSOLE_MAX).read_to_end(&mut bytes)?;
    fs::write(to, bytes)
}
