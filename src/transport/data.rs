//! Data streams: frames on their way from an agent to its site, one after the other:
//! `vm 16 │ point 16 │ frame` as `format::frame` lays it out, until the stream is finished.
//! Promises: a frame's body goes to the socket without being copied here; what arrives is bounded by the frame's head,
//! which is checked first. Whether the pages match their digest is for the receiver to see (`Frame::open`).

use super::{
    control::read_or_end,
    error::{RefusalCode, TransportError},
};
use crate::{
    format::frame::{Frame, FrameHead, HEAD_LEN},
    id::{PointId, VmId},
};
use bytes::{BufMut, Bytes, BytesMut};

/// The sending half of a data stream.
#[derive(Debug)]
pub struct DataSend {
    stream: quinn::SendStream,
}

impl DataSend {
    pub(super) fn new(stream: quinn::SendStream) -> Self {
        Self { stream }
    }

    /// Hands a frame to the link; waits while the windows are full. Not cancel-safe: a stream whose send was cut off is
    /// of no more use.
    pub async fn send(&mut self, vm: VmId, point: PointId, frame: &Frame) -> Result<(), TransportError> {
        let mut head = BytesMut::with_capacity(ADDRESS_LEN + frame.head.encoded_len());
        head.put_slice(vm.as_bytes());
        head.put_slice(point.as_bytes());
        frame.head.encode(&mut head);
        Ok(self.stream.write_all_chunks(&mut [head.freeze(), frame.body.clone()]).await?)
    }

    /// Says that no more frames will come; what was sent still arrives.
    pub fn finish(&mut self) {
        // It fails only if the stream has ended already.
        let _ = self.stream.finish();
    }

    /// Breaks the stream off: what has not arrived yet never will.
    pub fn abandon(&mut self) {
        let _ = self.stream.reset(RefusalCode::STOPPING.varint());
    }

    #[cfg(test)]
    pub(super) async fn send_raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }
}

/// A frame that arrived, and where it belongs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Landed {
    pub vm: VmId,
    pub point: PointId,
    pub frame: Frame,
}

/// The receiving half of a data stream.
#[derive(Debug)]
pub struct DataRecv {
    stream: quinn::RecvStream,
}

impl DataRecv {
    pub(super) fn new(stream: quinn::RecvStream) -> Self {
        Self { stream }
    }

    /// The next frame; `None` when the sender has finished. Not cancel-safe: give it a task of its own.
    pub async fn recv(&mut self) -> Result<Option<Landed>, TransportError> {
        let landed = self.read_frame().await;
        if let Err(TransportError::Protocol(_) | TransportError::Frame(_)) = &landed {
            self.refuse(RefusalCode::PROTOCOL);
        }
        landed
    }

    /// Tells the sender to stop: nothing more will be taken of this stream.
    pub fn refuse(&mut self, code: RefusalCode) {
        let _ = self.stream.stop(code.varint());
    }

    async fn read_frame(&mut self) -> Result<Option<Landed>, TransportError> {
        let mut fixed = [0; ADDRESS_LEN + HEAD_LEN];
        if !read_or_end(&mut self.stream, &mut fixed).await? {
            return Ok(None);
        }
        let (mut vm, mut point, mut head) = ([0; 16], [0; 16], [0; HEAD_LEN]);
        vm.copy_from_slice(&fixed[..16]);
        point.copy_from_slice(&fixed[16..ADDRESS_LEN]);
        head.copy_from_slice(&fixed[ADDRESS_LEN..]);
        let prefix = FrameHead::decode_prefix(&head)?;
        let body_len = prefix.body_len();
        let runs = self.read_exactly(prefix.runs_len()).await?;
        let head = prefix.with_runs(&runs)?;
        let body = self.read_exactly(body_len).await?;
        let (vm, point) = (VmId::from_bytes(vm), PointId::from_bytes(point));
        Ok(Some(Landed { vm, point, frame: Frame { head, body } }))
    }

    /// `len` is bounded by the frame's prefix. Nothing is allocated before the first byte is here.
    async fn read_exactly(&mut self, len: usize) -> Result<Bytes, TransportError> {
        let mut bytes = BytesMut::new();
        while bytes.len() < len {
            let chunk = self.stream.read_chunk(len - bytes.len(), true).await?.map(|chunk| chunk.bytes);
            match chunk {
                // Often a frame is one chunk; then there is nothing to put together.
                Some(whole) if whole.len() == len => return Ok(whole),
                Some(part) => {
                    if bytes.is_empty() {
                        bytes.reserve(len);
                    }
                    bytes.extend_from_slice(&part);
                }
                None => return Err(TransportError::protocol("a data stream ended in the middle of a frame")),
            }
        }
        Ok(bytes.freeze())
    }
}

/// Which VM and which point a frame is of.
const ADDRESS_LEN: usize = 32;
