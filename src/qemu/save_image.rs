//! libvirt's save image: a header, the domain's XML, then a migration stream. What `virsh restore` takes.
//! Layout (little-endian, 92 bytes): `0 "LibvirtQemudSave" │ 16 version=2 u32 │ 20 data_len u32 │ 24 was_running u32 │
//! 28 format=0 (raw) u32 │ 32 cookie_offset u32 │ 36 zeros`, then `data_len` bytes: the XML, a NUL, an optional
//! cookie, padding. Unchanged from libvirt 1.2 to 11. Promises: pure; parsing is bounded. Called by the site's restore.

const MAGIC: [u8; 16] = *b"LibvirtQemudSave";
const VERSION: u32 = 2;
/// Bytes before the XML.
pub const HEADER_LEN: usize = 92;
/// Bytes of XML, cookie and padding at the most: far above any domain's.
pub const DATA_MAX: u32 = 16 << 20;
/// The stream starts at a multiple of this, so that reads of it are aligned.
const ALIGN: usize = 64 << 10;

/// What stands before the migration stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SaveHeader {
    pub xml: String,
    /// libvirt's private notes on the domain (CPU model expansion, job state); optional.
    pub cookie: Option<String>,
    /// Whether a plain restore lets the guest run.
    pub was_running: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a libvirt save image that can be used: {0}")]
pub struct SaveImageError(&'static str);

impl SaveHeader {
    /// The image's bytes up to the migration stream, which the caller appends.
    pub fn compose(&self) -> Result<Vec<u8>, SaveImageError> {
        let texts = [Some(self.xml.as_str()), self.cookie.as_deref()];
        if texts.iter().flatten().any(|text| text.is_empty() || text.contains('\0')) {
            return Err(SaveImageError("its XML or cookie is empty or has a NUL in it"));
        }
        let text_len: usize = texts.iter().flatten().map(|text| text.len() + 1).sum();
        let end = (HEADER_LEN + text_len).next_multiple_of(ALIGN);
        let data_len = u32::try_from(end - HEADER_LEN).ok().filter(|len| *len <= DATA_MAX);
        let data_len = data_len.ok_or(SaveImageError("its XML is larger than any domain's"))?;
        let cookie_offset = if self.cookie.is_some() { self.xml.len() as u32 + 1 } else { 0 };
        let mut image = Vec::with_capacity(end);
        image.extend_from_slice(&MAGIC);
        for word in [VERSION, data_len, u32::from(self.was_running), 0, cookie_offset] {
            image.extend_from_slice(&word.to_le_bytes());
        }
        image.resize(HEADER_LEN, 0);
        for text in texts.iter().flatten() {
            image.extend_from_slice(text.as_bytes());
            image.push(0);
        }
        image.resize(end, 0);
        Ok(image)
    }

    /// Length of XML, cookie and padding, which stand between the fixed header and the stream.
    pub fn data_len(header: &[u8; HEADER_LEN]) -> Result<u32, SaveImageError> {
        let word =
            |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        if header[..16] != MAGIC {
            return Err(SaveImageError("wrong magic, or it was never finished"));
        }
        if word(16) != VERSION || word(28) != 0 {
            return Err(SaveImageError("a version or compression that is not known here"));
        }
        let data_len = word(20);
        if data_len == 0 || data_len > DATA_MAX || word(32) >= data_len {
            return Err(SaveImageError("a length that no domain's XML has"));
        }
        Ok(data_len)
    }

    /// Reads back `header` and the `data_len` bytes after it.
    pub fn parse(header: &[u8; HEADER_LEN], data: &[u8]) -> Result<Self, SaveImageError> {
        if Self::data_len(header)? as usize != data.len() {
            return Err(SaveImageError("it is cut short"));
        }
        let cookie_offset = u32::from_le_bytes([header[32], header[33], header[34], header[35]]) as usize;
        let text = |bytes: &[u8]| {
            let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
            String::from_utf8(bytes[..end].to_vec()).map_err(|_| SaveImageError("its XML is not text"))
        };
        let cookie = if cookie_offset == 0 { None } else { Some(text(&data[cookie_offset..])?) };
        let xml = text(if cookie_offset == 0 { data } else { &data[..cookie_offset] })?;
        Ok(Self { xml, cookie, was_running: header[24..28] != [0; 4] })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(image: &[u8]) -> Result<SaveHeader, SaveImageError> {
        let (header, data) = image.split_first_chunk::<HEADER_LEN>().ok_or(SaveImageError("short"))?;
        let len = SaveHeader::data_len(header)? as usize;
        SaveHeader::parse(header, data.get(..len).ok_or(SaveImageError("short"))?)
    }

    #[test]
    fn the_header_has_the_bytes_that_libvirt_reads() {
        let head = SaveHeader { xml: "<domain/>".into(), cookie: None, was_running: true };
        let image = head.compose().unwrap();
        assert_eq!(image.len(), ALIGN);
        assert_eq!(&image[..36], b"LibvirtQemudSave\x02\0\0\0\xa4\xff\0\0\x01\0\0\0\0\0\0\0\0\0\0\0");
        assert_eq!(&image[HEADER_LEN..HEADER_LEN + 10], b"<domain/>\0");
        assert!(image[36..HEADER_LEN].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn an_unfinished_image_is_refused() {
        let mut image = SaveHeader { xml: "x".into(), cookie: None, was_running: false }.compose().unwrap();
        image[12..16].copy_from_slice(b"Part");
        assert!(parse(&image).is_err());
        assert!(SaveHeader { xml: "a\0b".into(), cookie: None, was_running: false }.compose().is_err());
    }

    proptest! {
        #[test]
        fn what_is_composed_comes_back(xml in "[^\0]{1,2000}", cookie in prop::option::of("[^\0]{1,100}"), was_running: bool) {
            let head = SaveHeader { xml, cookie, was_running };
            prop_assert_eq!(parse(&head.compose().unwrap()).unwrap(), head);
        }

        #[test]
        fn arbitrary_bytes_never_panic(mut noise in prop::collection::vec(any::<u8>(), 0..400), magic: bool) {
            if magic && noise.len() >= 16 { noise[..16].copy_from_slice(&MAGIC); }
            let _ = parse(&noise);
        }
    }
}
