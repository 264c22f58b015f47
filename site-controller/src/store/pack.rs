//! Packs on their way to disk, and their indices on the way back.
//! Promises: a writer holds one part and its index in memory, never the pack; an index is believed only if its digest is
//! the one that the manifest names and its frames lie back to back. Called by `commit`, restore and verify.

use crate::store::{
    error::StoreError,
    objects::{Objects, PART, Upload},
    paths,
};
use bytes::{Bytes, BytesMut};
use lifeboat::{
    chunk::digest::{Digest, Digester},
    format::{
        frame::{FRAME_MAX, Frame},
        pack::{IndexEntry, PackRef, decode_index, encode_index, is_gapless, pack_header},
    },
    id::{PackId, VmId},
};

/// An index longer than this ends its pack, so that what a pack costs in memory is bounded.
pub const INDEX_ROLL: usize = 8 << 20;
/// No index that this release wrote is longer.
const INDEX_MAX: u64 = (INDEX_ROLL + FRAME_MAX) as u64;

pub struct PackWriter {
    id: PackId,
    upload: Box<dyn Upload>,
    part: BytesMut,
    digester: Digester,
    len: u64,
    index: BytesMut,
    frames: u32,
}

impl PackWriter {
    pub async fn start(objects: &dyn Objects, path: &str, id: PackId) -> Result<Self, StoreError> {
        let upload = objects.create(path).await?;
        let (part, digester, index) = (BytesMut::new(), Digester::default(), BytesMut::new());
        let mut writer = Self { id, upload, part, digester, len: 0, index, frames: 0 };
        writer.put(&pack_header()).await?;
        Ok(writer)
    }

    /// Not cancel-safe: whoever drops this in the middle must abort the pack.
    pub async fn push(&mut self, frame: &Frame) -> Result<(), StoreError> {
        let entry = IndexEntry { offset: self.len, head: frame.head.clone() };
        let encoded = encode_index(std::slice::from_ref(&entry));
        self.index.extend_from_slice(&encoded);
        self.frames += 1;
        // An index entry is the frame's offset and then its head, as it stands in the pack.
        self.put(&encoded[size_of::<u64>()..]).await?;
        self.put(&frame.body).await
    }

    pub fn is_full(&self, roll_at: u64) -> bool {
        self.len >= roll_at || self.index.len() >= INDEX_ROLL
    }

    pub fn id(&self) -> PackId {
        self.id
    }

    /// Returns once the pack, its index included, is on stable storage.
    pub async fn finish(mut self) -> Result<PackRef, StoreError> {
        let index_offset = self.len;
        let index = self.index.split().freeze();
        self.put(&index).await?;
        self.flush().await?;
        self.upload.finish_durable().await?;
        Ok(PackRef {
            id: self.id,
            len: self.len,
            index_offset,
            index_digest: Digest::of(&index),
            file_digest: self.digester.finish(),
            frames: self.frames,
        })
    }

    pub async fn abort(self) {
        self.upload.abort().await;
    }

    async fn put(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.len += bytes.len() as u64;
        let mut rest = bytes;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(PART - self.part.len()));
            self.part.extend_from_slice(now);
            rest = later;
            if self.part.len() == PART {
                self.flush().await?;
            }
        }
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), StoreError> {
        let part: Bytes = self.part.split().freeze();
        if part.is_empty() {
            return Ok(());
        }
        self.digester.update(&part);
        self.upload.write(part).await
    }
}

/// Reads and checks the index of a pack of a point.
pub async fn read_index(
    objects: &dyn Objects,
    vm: VmId,
    pack: &PackRef,
) -> Result<Vec<IndexEntry>, StoreError> {
    read_index_at(objects, &paths::pack(vm, pack.id), pack).await
}

/// Reads and checks the index of the pack that lies at `path`.
pub async fn read_index_at(
    objects: &dyn Objects,
    path: &str,
    pack: &PackRef,
) -> Result<Vec<IndexEntry>, StoreError> {
    let damaged = |what: &str| StoreError::damaged(path, what);
    let len = pack.index_len().filter(|len| *len <= INDEX_MAX);
    len.ok_or_else(|| damaged("its manifest gives its index an impossible length"))?;
    let bytes = objects.get_range(path, pack.index_offset..pack.len).await?;
    if Digest::of(&bytes) != pack.index_digest {
        return Err(damaged("its index does not match its digest"));
    }
    let entries = decode_index(&bytes).map_err(|error| StoreError::damaged(path, error))?;
    if entries.len() != pack.frames as usize || !is_gapless(&entries, pack.index_offset) {
        return Err(damaged("its index does not account for every byte"));
    }
    Ok(entries)
}
