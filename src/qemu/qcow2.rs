//! What the header of a qcow2 image says of other files: the image that it is made over, and whether its data lie elsewhere
//! (QEMU's docs/interop/qcow2.txt: all big-endian; the base's name at byte 8, its length at 16, features that a reader must
//! know at 72, from version 3 on).
//! Promises: reads a header and a name, of the longest that QEMU takes; whatever else is there is no qcow2 image, or an error.
//! Called by the agent for guests that are off, and by the site for the folders of replicas.

use std::{
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

/// As QEMU has it: no chain of images is longer.
pub const CHAIN_MAX: usize = 200;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leads {
    /// As it is written; see [`beside`].
    pub base: Option<String>,
    /// What guests write is in another file, which the header's time does not tell of.
    pub data_elsewhere: bool,
}

/// `None`: it is no qcow2 image.
pub fn read(image: &impl FileExt) -> io::Result<Option<Leads>> {
    let head = read_at_most(image, 0, HEAD)?;
    let number = |from: usize, len: usize| {
        let bytes = head.get(from..from + len)?;
        Some(bytes.iter().fold(0u64, |number, byte| number << 8 | u64::from(*byte)))
    };
    let (true, Some(version), Some(at), Some(len)) =
        (head.starts_with(MAGIC), number(4, 4), number(8, 8), number(16, 4))
    else {
        return Ok(None);
    };
    let features = if version >= 3 { number(72, 8).unwrap_or_default() } else { 0 };
    let data_elsewhere = features & DATA_FILE != 0;
    if at == 0 || len == 0 {
        return Ok(Some(Leads { base: None, data_elsewhere }));
    }
    let len = usize::try_from(len).ok().filter(|len| *len <= NAME_MAX);
    let len = len.ok_or_else(|| broken("its header names a base of more bytes than a name may have"))?;
    let name = read_at_most(image, at, len)?;
    if name.len() < len {
        return Err(broken("the name of its base is cut short"));
    }
    Ok(Some(Leads { base: Some(String::from_utf8_lossy(&name).into_owned()), data_elsewhere }))
}

/// The file that a base's name leads to from its image; `None`: it is no file of this host.
pub fn beside(image: &Path, named: &str) -> Option<PathBuf> {
    // `json:{"driver":"raw","file":{"filename":"/srv/a.raw"}}`: QEMU's long form.
    let named = match named.strip_prefix("json:") {
        Some(long) => long.split('"').rfind(|word| word.starts_with('/'))?,
        None => named.strip_prefix("file:").unwrap_or(named),
    };
    let is_protocol = named.split_once(':').is_some_and(|(protocol, _)| !protocol.contains('/'));
    (!is_protocol).then(|| image.parent().unwrap_or(Path::new("/")).join(named))
}

fn read_at_most(image: &impl FileExt, at: u64, len: usize) -> io::Result<Vec<u8>> {
    let (mut bytes, mut got) = (vec![0; len], 0);
    while got < len {
        match image.read_at(&mut bytes[got..], at.saturating_add(got as u64)) {
            Ok(0) => break,
            Ok(more) => got += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(got);
    Ok(bytes)
}

fn broken(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

const MAGIC: &[u8] = b"QFI\xfb";
/// What is looked at of a header.
const HEAD: usize = 80;
const DATA_FILE: u64 = 1 << 2;
/// QEMU's own limit.
const NAME_MAX: usize = 1023;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{fs::File, io::Write, process::Command};

    fn leads(bytes: &[u8]) -> io::Result<Option<Leads>> {
        let mut file = tempfile::tempfile()?;
        file.write_all(bytes)?;
        read(&file)
    }

    /// Goal: what QEMU writes is read as it means it.
    #[test]
    fn bases_and_data_files_are_told_as_qemu_img_writes_them() {
        let dir = tempfile::tempdir().unwrap();
        let read_made = |words: &[&str]| {
            let made = Command::new("qemu-img")
                .args(["create", "-q", "-f", "qcow2"])
                .args(words)
                .args(["a.qcow2", "1M"])
                .current_dir(dir.path())
                .output();
            let made = made.unwrap();
            assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
            read(&File::open(dir.path().join("a.qcow2")).unwrap()).unwrap()
        };
        assert_eq!(read_made(&[]), Some(Leads::default()));
        assert_eq!(read_made(&["-o", "compat=0.10"]), Some(Leads::default()));
        let over = read_made(&["-u", "-F", "raw", "-b", "some, other.raw"]).unwrap();
        assert_eq!(over, Leads { base: Some("some, other.raw".into()), data_elsewhere: false });
        assert!(read_made(&["-o", "data_file=data.raw"]).unwrap().data_elsewhere);
    }

    #[test]
    fn a_name_leads_to_a_file_beside_its_image_or_to_none() {
        let image = Path::new("/srv/images/a.qcow2");
        for (named, leads) in [
            ("base.raw", Some("/srv/images/base.raw")),
            ("../b:1.raw", Some("/srv/images/../b:1.raw")),
            ("/srv/base", Some("/srv/base")),
            ("file:/srv/base", Some("/srv/base")),
            (r#"json:{"driver":"raw","file":{"driver":"file","filename":"/srv/a.raw"}}"#, Some("/srv/a.raw")),
            (r#"json:{"driver":"nbd","host":"there"}"#, None),
            ("nbd://there/disk", None),
        ] {
            assert_eq!(beside(image, named).as_deref(), leads.map(Path::new), "{named}");
        }
    }

    proptest! {
        #[test]
        fn no_header_makes_it_panic_or_read_without_bound(
            head in prop::collection::vec(any::<u8>(), 0..120), place: Option<u16>, len: Option<u16>,
        ) {
            let mut bytes = [MAGIC, &head].concat();
            if bytes.len() >= 20 {
                place.into_iter().for_each(|at| bytes[8..16].copy_from_slice(&u64::from(at).to_be_bytes()));
                len.into_iter().for_each(|len| bytes[16..20].copy_from_slice(&u32::from(len).to_be_bytes()));
            }
            if let Ok(Some(Leads { base: Some(base), .. })) = leads(&bytes) {
                // What is not text grows when it is made text.
                prop_assert!(!base.is_empty() && base.len() <= 3 * NAME_MAX);
            }
        }
    }
}
