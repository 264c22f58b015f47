//! Fixed newstyle handshake: structured replies, meta contexts, `NBD_OPT_GO`.
//! Promises: ends in the transmission phase with all that was asked for, or in an error. Called by `client`.

use super::NbdError;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

/// What was agreed.
pub(super) struct Agreed {
    pub size: u64,
    /// Ids of the meta contexts, in the order they were asked for.
    pub contexts: Vec<u32>,
}

pub(super) async fn negotiate(
    stream: &mut UnixStream,
    export: &str,
    contexts: &[String],
) -> Result<Agreed, NbdError> {
    greet(stream).await?;
    send_option(stream, OPT_STRUCTURED_REPLY, &[]).await?;
    match read_option_reply(stream, OPT_STRUCTURED_REPLY).await? {
        OptionReply::Ack => {}
        OptionReply::Error(reason) => return Err(refused("structured replies", reason)),
        OptionReply::Data(..) => return Err(NbdError::Protocol("structured replies answered with data")),
    }
    let ids = if contexts.is_empty() { Vec::new() } else { set_contexts(stream, export, contexts).await? };
    let size = go(stream, export).await?;
    Ok(Agreed { size, contexts: ids })
}

async fn greet(stream: &mut UnixStream) -> Result<(), NbdError> {
    let magic = stream.read_u64().await.map_err(lost)?;
    let option_magic = stream.read_u64().await.map_err(lost)?;
    if magic != SERVER_MAGIC || option_magic != OPTION_MAGIC {
        return Err(NbdError::Protocol("this is no newstyle NBD server"));
    }
    let flags = stream.read_u16().await.map_err(lost)?;
    if flags & FLAG_FIXED_NEWSTYLE == 0 {
        return Err(NbdError::Protocol("the server does not speak fixed newstyle"));
    }
    // Echo what we understand; without NO_ZEROES nothing changes for NBD_OPT_GO.
    let answer = u32::from(flags & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES));
    stream.write_u32(answer).await.map_err(lost)
}

async fn set_contexts(
    stream: &mut UnixStream,
    export: &str,
    contexts: &[String],
) -> Result<Vec<u32>, NbdError> {
    let mut body = Vec::new();
    put_text(&mut body, export)?;
    body.extend_from_slice(&length(contexts.len())?.to_be_bytes());
    for context in contexts {
        put_text(&mut body, context)?;
    }
    send_option(stream, OPT_SET_META_CONTEXT, &body).await?;
    let mut ids = vec![None; contexts.len()];
    loop {
        match read_option_reply(stream, OPT_SET_META_CONTEXT).await? {
            OptionReply::Ack => break,
            OptionReply::Error(reason) => return Err(refused(&format!("export `{export}`"), reason)),
            OptionReply::Data(REP_META_CONTEXT, body) => {
                let (id, name) =
                    body.split_at_checked(4).ok_or(NbdError::Protocol("a meta context without an id"))?;
                let at = contexts.iter().position(|context| context.as_bytes() == name);
                let at = at.ok_or(NbdError::Protocol("a meta context that was not asked for"))?;
                if ids[at].replace(be32(id)).is_some() {
                    return Err(NbdError::Protocol("a meta context twice"));
                }
            }
            OptionReply::Data(..) => {
                return Err(NbdError::Protocol("meta contexts answered with something else"));
            }
        }
    }
    let missing = |at: usize| refused(&format!("meta context `{}`", contexts[at]), "unknown here".into());
    let ids: Vec<u32> = ids
        .into_iter()
        .enumerate()
        .map(|(at, id)| id.ok_or_else(|| missing(at)))
        .collect::<Result<_, _>>()?;
    if ids.iter().enumerate().any(|(at, id)| ids[..at].contains(id)) {
        return Err(NbdError::Protocol("two meta contexts share an id"));
    }
    Ok(ids)
}

async fn go(stream: &mut UnixStream, export: &str) -> Result<u64, NbdError> {
    let mut body = Vec::new();
    put_text(&mut body, export)?;
    body.extend_from_slice(&0u16.to_be_bytes());
    send_option(stream, OPT_GO, &body).await?;
    let mut size = None;
    // The export's size, and whatever else the server volunteers; a handful, bounded so that it can't go on for ever.
    for _ in 0..INFOS_MAX {
        match read_option_reply(stream, OPT_GO).await? {
            OptionReply::Ack => {
                let size = size.ok_or(NbdError::Protocol("no export information before the end"))?;
                return Ok(size);
            }
            OptionReply::Error(reason) => return Err(refused(&format!("export `{export}`"), reason)),
            OptionReply::Data(REP_INFO, body) => match body.split_at_checked(2) {
                Some(([0, 0], export)) if export.len() == 10 => {
                    let bytes: [u8; 8] = export[..8].try_into().unwrap_or_default();
                    size = Some(u64::from_be_bytes(bytes));
                }
                Some(([0, 0], _)) => return Err(NbdError::Protocol("malformed export information")),
                Some(_) => {}
                None => return Err(NbdError::Protocol("malformed information")),
            },
            OptionReply::Data(..) => return Err(NbdError::Protocol("GO answered with something else")),
        }
    }
    Err(NbdError::Protocol("endless export information"))
}

enum OptionReply {
    Ack,
    /// Reply type, body.
    Data(u32, Vec<u8>),
    Error(String),
}

async fn send_option(stream: &mut UnixStream, option: u32, body: &[u8]) -> Result<(), NbdError> {
    let mut message = Vec::with_capacity(16 + body.len());
    message.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    message.extend_from_slice(&option.to_be_bytes());
    message.extend_from_slice(&length(body.len())?.to_be_bytes());
    message.extend_from_slice(body);
    stream.write_all(&message).await.map_err(lost)
}

async fn read_option_reply(stream: &mut UnixStream, option: u32) -> Result<OptionReply, NbdError> {
    if stream.read_u64().await.map_err(lost)? != OPTION_REPLY_MAGIC {
        return Err(NbdError::Protocol("an option reply with a wrong magic number"));
    }
    if stream.read_u32().await.map_err(lost)? != option {
        return Err(NbdError::Protocol("a reply to an option that was not sent"));
    }
    let kind = stream.read_u32().await.map_err(lost)?;
    let len = stream.read_u32().await.map_err(lost)?;
    if len > OPTION_REPLY_MAX {
        return Err(NbdError::Protocol("an option reply that is too long"));
    }
    let mut body = vec![0; len as usize];
    stream.read_exact(&mut body).await.map_err(lost)?;
    Ok(match kind {
        REP_ACK if body.is_empty() => OptionReply::Ack,
        REP_ACK => return Err(NbdError::Protocol("an acknowledgement with a body")),
        kind if kind & REP_ERROR != 0 => {
            let words = String::from_utf8_lossy(&body).into_owned();
            OptionReply::Error(if words.is_empty() {
                format!("error {:#x}", kind ^ REP_ERROR)
            } else {
                words
            })
        }
        kind => OptionReply::Data(kind, body),
    })
}

fn put_text(body: &mut Vec<u8>, text: &str) -> Result<(), NbdError> {
    body.extend_from_slice(&length(text.len())?.to_be_bytes());
    body.extend_from_slice(text.as_bytes());
    Ok(())
}

fn length(len: usize) -> Result<u32, NbdError> {
    u32::try_from(len).map_err(|_| NbdError::Protocol("a name too long for the protocol"))
}

fn be32(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

fn refused(what: &str, reason: String) -> NbdError {
    NbdError::Refused { what: what.into(), reason }
}

fn lost(error: std::io::Error) -> NbdError {
    NbdError::lost("agreeing on the protocol", error)
}

pub(super) const SERVER_MAGIC: u64 = 0x4e42_444d_4147_4943;
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub(super) const FLAG_FIXED_NEWSTYLE: u16 = 1;
const FLAG_NO_ZEROES: u16 = 2;
pub(super) const OPT_GO: u32 = 7;
pub(super) const OPT_STRUCTURED_REPLY: u32 = 8;
pub(super) const OPT_SET_META_CONTEXT: u32 = 10;
pub(super) const REP_ACK: u32 = 1;
pub(super) const REP_INFO: u32 = 3;
pub(super) const REP_META_CONTEXT: u32 = 4;
pub(super) const REP_ERROR: u32 = 1 << 31;
/// An option's reply holds a name (4096 at most) and a few numbers.
const OPTION_REPLY_MAX: u32 = 16 << 10;
const INFOS_MAX: usize = 64;
