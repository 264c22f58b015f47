//! A server that agrees on everything and then says what the test tells it to.

use crate::nbd::{
    Client,
    client::{CHUNK_DATA, CHUNK_MAGIC, CHUNK_STATUS, REQUEST_MAGIC},
    handshake::{
        FLAG_FIXED_NEWSTYLE, OPT_GO, OPT_SET_META_CONTEXT, OPTION_MAGIC, OPTION_REPLY_MAGIC, REP_ACK,
        REP_INFO, REP_META_CONTEXT, SERVER_MAGIC,
    },
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

pub struct Fake(UnixStream);

pub struct Request {
    pub cookie: u64,
    pub offset: u64,
    pub len: u32,
}

impl Fake {
    pub fn on(stream: UnixStream) -> Self {
        Self(stream)
    }

    /// An export of `size` bytes with meta contexts numbered 1, 2 …, and a client of it.
    pub async fn serve(size: u64, contexts: &[&'static str]) -> (Client, Self) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let names = contexts.to_vec();
        let server = tokio::spawn(async move {
            let mut fake = Self(theirs);
            fake.agree(size, &names).await;
            fake
        });
        let contexts: Vec<String> = contexts.iter().map(|name| (*name).into()).collect();
        let client = Client::open(ours, "vda", &contexts).await.unwrap();
        (client, server.await.unwrap())
    }

    async fn agree(&mut self, size: u64, contexts: &[&str]) {
        let greeting = [&SERVER_MAGIC.to_be_bytes()[..], &OPTION_MAGIC.to_be_bytes()].concat();
        self.send(&[greeting, FLAG_FIXED_NEWSTYLE.to_be_bytes().to_vec()].concat()).await;
        self.0.read_u32().await.unwrap();
        loop {
            assert_eq!(self.0.read_u64().await.unwrap(), OPTION_MAGIC);
            let option = self.0.read_u32().await.unwrap();
            let mut body = vec![0; self.0.read_u32().await.unwrap() as usize];
            self.0.read_exact(&mut body).await.unwrap();
            if option == OPT_SET_META_CONTEXT {
                for (id, name) in (1u32..).zip(contexts) {
                    let body = [&id.to_be_bytes()[..], name.as_bytes()].concat();
                    self.option_reply(option, REP_META_CONTEXT, &body).await;
                }
            }
            if option == OPT_GO {
                let body = [&[0, 0][..], &size.to_be_bytes(), &[0, 3]].concat();
                self.option_reply(option, REP_INFO, &body).await;
            }
            self.option_reply(option, REP_ACK, &[]).await;
            if option == OPT_GO {
                return;
            }
        }
    }

    async fn option_reply(&mut self, option: u32, kind: u32, body: &[u8]) {
        let head = [option.to_be_bytes(), kind.to_be_bytes(), (body.len() as u32).to_be_bytes()].concat();
        self.send(&[&OPTION_REPLY_MAGIC.to_be_bytes()[..], &head, body].concat()).await;
    }

    pub async fn request(&mut self) -> Request {
        assert_eq!(self.0.read_u32().await.unwrap(), REQUEST_MAGIC);
        self.0.read_u32().await.unwrap();
        let cookie = self.0.read_u64().await.unwrap();
        let offset = self.0.read_u64().await.unwrap();
        Request { cookie, offset, len: self.0.read_u32().await.unwrap() }
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        // The client may have hung up on what came before.
        let _ = self.0.write_all(bytes).await;
    }
}

pub fn chunk(flags: u16, kind: u16, cookie: u64, body: &[u8]) -> Vec<u8> {
    let head = [flags.to_be_bytes(), kind.to_be_bytes()].concat();
    let len = (body.len() as u32).to_be_bytes();
    [&CHUNK_MAGIC.to_be_bytes()[..], &head, &cookie.to_be_bytes(), &len, body].concat()
}

pub fn data(flags: u16, cookie: u64, offset: u64, bytes: &[u8]) -> Vec<u8> {
    chunk(flags, CHUNK_DATA, cookie, &[&offset.to_be_bytes()[..], bytes].concat())
}

/// A block status that is not the last chunk.
pub fn status(cookie: u64, context: u32, extents: &[(u32, u32)]) -> Vec<u8> {
    let mut body = context.to_be_bytes().to_vec();
    for (bytes, flags) in extents {
        body.extend_from_slice(&bytes.to_be_bytes());
        body.extend_from_slice(&flags.to_be_bytes());
    }
    chunk(0, CHUNK_STATUS, cookie, &body)
}
