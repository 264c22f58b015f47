//! Whether a host sees a file, asked through its libvirt alone: a pool of the file's folder that is nowhere defined, and gone
//! when it was looked at; and such pools that were left by whoever died over it. Every call blocks. Called by the site's
//! failover, of hosts that are not its own.

use super::{Hypervisor, HypervisorError, host::known};
use std::path::Path;
use uuid::Uuid;
use virt::{
    connect::Connect,
    error::{Error, ErrorNumber},
    storage_pool::StoragePool,
    sys,
};

impl Hypervisor {
    /// Whether its host has this file, which is named by its whole path; `None` if its libvirt can't say.
    pub fn sees_file(&self, file: &Path) -> Result<Option<bool>, HypervisorError> {
        let (Some(folder), Some(name)) = (file.parent(), file.file_name()) else { return Ok(Some(false)) };
        let (folder, name) = (folder.to_string_lossy().into_owned(), name.to_string_lossy().into_owned());
        self.with(&format!("looking for {}", file.display()), |link| look(&link.connect, &folder, &name))
    }

    /// The names of pools that such looks have made and not ended yet.
    pub fn looks(&self) -> Result<Vec<String>, HypervisorError> {
        self.with("looking for what looks have left", |link| {
            let pools =
                match link.connect.list_all_storage_pools(sys::VIR_CONNECT_LIST_STORAGE_POOLS_TRANSIENT) {
                    Err(error) if error.code() == ErrorNumber::NoSupport.into() => Vec::new(),
                    pools => pools?,
                };
            let names = pools.iter().map(StoragePool::name).collect::<Result<Vec<_>, _>>()?;
            Ok(names.into_iter().filter(|name| is_look(name)).collect())
        })
    }

    /// Ends one that nobody looks at any more; what it shows stays.
    pub fn end_look(&self, name: &str) -> Result<(), HypervisorError> {
        self.with(&format!("ending {name}"), |link| link.connect.lookup_storage_pool_by_name(name)?.destroy())
    }
}

fn look(connect: &Connect, folder: &str, name: &str) -> Result<Option<bool>, Error> {
    let (pool, ours) = match connect.create_storage_pool_xml(&pool_of(folder), 0) {
        Ok(pool) => (pool, true),
        Err(error) if error.code() == ErrorNumber::NoSupport.into() => return Ok(None),
        Err(error) => match connect.lookup_storage_pool_by_target_path(folder) {
            // Somebody else's of the same folder stands in the way, and does as well.
            Ok(pool) => (pool, false),
            Err(_) if error.code() == ErrorNumber::SystemError.into() => return Ok(Some(false)),
            Err(_) => return Err(error),
        },
    };
    let found = listed(&pool, ours, name);
    if ours {
        pool.destroy()?;
    }
    found
}

fn listed(pool: &StoragePool, ours: bool, name: &str) -> Result<Option<bool>, Error> {
    if !ours && pool.is_active()? {
        pool.refresh(0)?;
    }
    known(pool.lookup_storage_vol_by_name(name).map(drop), ErrorNumber::NoStorageVolume)
}

fn pool_of(folder: &str) -> String {
    let folder: String = folder
        .chars()
        .map(|c| match c {
            '&' => "&amp;".to_owned(),
            '<' => "&lt;".to_owned(),
            '>' => "&gt;".to_owned(),
            other => other.to_string(),
        })
        .collect();
    let name = Uuid::new_v4().simple();
    format!("<pool type='dir'><name>{LOOK}{name}</name><target><path>{folder}</path></target></pool>")
}

fn is_look(name: &str) -> bool {
    let id = name.strip_prefix(LOOK).unwrap_or_default();
    id.len() == 32 && id.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

const LOOK: &str = "lifeboat-";
