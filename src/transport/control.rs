//! Control messages on a stream: `tag u16 │ length u32 │ body` (little-endian), the body in postcard.
//! Promises: the length is checked against the message's cap before anything is allocated; a body that is longer or
//! shorter than its message is refused. Called by `ship` and `intake` through `Connection`, and by `enrol`.

use super::error::{RefusalCode, TransportError};
use crate::wire::message::{AgentMessage, SiteMessage};
use bytes::{BufMut, Bytes, BytesMut};
use serde::{Serialize, de::DeserializeOwned};

/// Something that travels on a control stream.
pub trait Message: Serialize + DeserializeOwned {
    /// Tells messages of one kind from another's; retired, never reused.
    const TAG: u16;
    /// Bytes of an encoded message at the most.
    const BODY_MAX: u32 = CONTROL_MAX;
}

impl Message for AgentMessage {
    const TAG: u16 = 0x0001;
}

impl Message for SiteMessage {
    const TAG: u16 = 0x0002;
}

/// No control message is larger.
pub const CONTROL_MAX: u32 = 4 << 20;

/// The sending half of a control stream.
#[derive(Debug)]
pub struct ControlSend {
    stream: quinn::SendStream,
}

impl ControlSend {
    pub(super) fn new(stream: quinn::SendStream) -> Self {
        // What is said must not queue behind what is shipped.
        let _ = stream.set_priority(CONTROL_PRIORITY);
        Self { stream }
    }

    /// Sends one message. Not cancel-safe: a stream whose send was cut off is of no more use.
    pub async fn send<M: Message>(&mut self, message: &M) -> Result<(), TransportError> {
        let bytes = encode(message)?;
        Ok(self.stream.write_chunk(bytes).await?)
    }

    /// Says that nothing more will come.
    pub fn finish(&mut self) {
        // It fails only if the stream has ended already.
        let _ = self.stream.finish();
    }

    /// Waits until the other side has all that was sent (after [`Self::finish`]) or wants no more.
    pub async fn delivered(&mut self) {
        let _ = self.stream.stopped().await;
    }

    #[cfg(test)]
    pub(super) async fn send_raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }
}

/// The receiving half of a control stream.
#[derive(Debug)]
pub struct ControlRecv {
    stream: quinn::RecvStream,
}

impl ControlRecv {
    pub(super) fn new(stream: quinn::RecvStream) -> Self {
        Self { stream }
    }

    /// The next message; `None` when the other side has finished. Not cancel-safe: give it a task of its own.
    pub async fn recv<M: Message>(&mut self) -> Result<Option<M>, TransportError> {
        let mut head = [0; HEAD_LEN];
        if !read_or_end(&mut self.stream, &mut head).await? {
            return Ok(None);
        }
        let len = decode_head::<M>(&head).inspect_err(|_| self.refuse())?;
        let mut body = BytesMut::zeroed(len);
        self.stream.read_exact(&mut body).await?;
        decode_body(&body).map(Some).inspect_err(|_| self.refuse())
    }

    /// Nothing after a violation is worth reading; the sender is told to stop.
    fn refuse(&mut self) {
        let _ = self.stream.stop(RefusalCode::PROTOCOL.varint());
    }
}

/// Fills `buf`, or tells that the stream ended right before it.
pub(super) async fn read_or_end(
    stream: &mut quinn::RecvStream,
    buf: &mut [u8],
) -> Result<bool, TransportError> {
    match stream.read_exact(buf).await {
        Ok(()) => Ok(true),
        Err(quinn::ReadExactError::FinishedEarly(0)) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn encode<M: Message>(message: &M) -> Result<Bytes, TransportError> {
    let body = postcard::to_stdvec(message).map_err(TransportError::protocol)?;
    let len = u32::try_from(body.len()).ok().filter(|len| *len <= cap::<M>());
    let len = len.ok_or_else(|| {
        TransportError::protocol(format_args!("a message of {} bytes is larger than its cap", body.len()))
    })?;
    let mut bytes = BytesMut::with_capacity(HEAD_LEN + body.len());
    bytes.put_u16_le(M::TAG);
    bytes.put_u32_le(len);
    bytes.put_slice(&body);
    Ok(bytes.freeze())
}

/// The body's length, if the head is that of an `M` no larger than it may be.
fn decode_head<M: Message>(head: &[u8; HEAD_LEN]) -> Result<usize, TransportError> {
    let [tag_low, tag_high, len @ ..] = *head;
    let (tag, len) = (u16::from_le_bytes([tag_low, tag_high]), u32::from_le_bytes(len));
    if tag != M::TAG {
        return Err(TransportError::protocol(format_args!(
            "message tag {tag:#06x} instead of {:#06x}",
            M::TAG
        )));
    }
    if len > cap::<M>() {
        let max = cap::<M>();
        return Err(TransportError::protocol(format_args!(
            "a message of {len} bytes where {max} are allowed"
        )));
    }
    Ok(len as usize)
}

fn decode_body<M: Message>(body: &[u8]) -> Result<M, TransportError> {
    match postcard::take_from_bytes(body) {
        Ok((message, [])) => Ok(message),
        Ok(_) => Err(TransportError::protocol("a message is followed by bytes that are none of it")),
        Err(error) => Err(TransportError::protocol(format_args!("a message can't be read: {error}"))),
    }
}

fn cap<M: Message>() -> u32 {
    M::BODY_MAX.min(CONTROL_MAX)
}

const HEAD_LEN: usize = 6;
const CONTROL_PRIORITY: i32 = 1;

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Note {
        number: u32,
        text: String,
    }
    impl Message for Note {
        const TAG: u16 = 0x0102;
        const BODY_MAX: u32 = 16;
    }

    #[test]
    fn the_framing_has_the_bytes_it_has_always_had() {
        let bytes = encode(&Note { number: 300, text: "hi".into() }).unwrap();
        assert_eq!(&bytes[..], b"\x02\x01\x05\x00\x00\x00\xac\x02\x02hi");
        assert_eq!(decode_head::<Note>(bytes[..6].try_into().unwrap()).unwrap(), 5);
        assert_eq!(decode_body::<Note>(&bytes[6..]).unwrap(), Note { number: 300, text: "hi".into() });
    }

    #[test]
    fn other_tags_long_bodies_and_trailing_bytes_are_refused() {
        assert!(encode(&Note { number: 0, text: "longer than its cap".into() }).is_err());
        assert!(decode_head::<Note>(b"\x03\x01\x05\x00\x00\x00").is_err());
        assert!(decode_head::<Note>(b"\x02\x01\x11\x00\x00\x00").is_err());
        assert!(decode_head::<Note>(b"\x02\x01\xff\xff\xff\xff").is_err());
        assert!(decode_body::<Note>(b"\xac\x02\x02hi!").is_err());
        assert!(decode_body::<Note>(b"\xac\x02\x09hi").is_err());
    }
}
