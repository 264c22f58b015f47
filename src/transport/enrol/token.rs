//! The token: one word that an operator pastes, `LB1-` and 84 letters and digits. It holds the site's authority (so that the
//! agent can't be led to another site) and a secret (so that the site knows that an operator sent the agent).
//! Promises: a typing error is told from a wrong token; the secret is printed only by `Display`, on purpose.

use crate::transport::pki::{Fingerprint, sha256};
use std::{fmt, str::FromStr};

/// What an operator carries from the site to a new agent. Whoever holds it can enrol one agent.
#[derive(Clone, PartialEq, Eq)]
pub struct EnrolmentToken {
    pub authority: Fingerprint,
    pub(super) secret: Secret,
}

pub type Secret = [u8; 16];

/// What was pasted is no token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    #[error(
        "this is no enrolment token; one starts with `{PREFIX}` and has {LETTERS} letters and digits after it"
    )]
    Malformed,
    #[error("the token was not copied whole or has a typing error; copy it again")]
    Mistyped,
}

impl fmt::Display for EnrolmentToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = Vec::with_capacity(BYTES);
        bytes.extend_from_slice(self.authority.as_bytes());
        bytes.extend_from_slice(&self.secret);
        bytes.extend_from_slice(&check(&bytes));
        f.write_str(PREFIX)?;
        f.write_str(&to_letters(&bytes))
    }
}

impl fmt::Debug for EnrolmentToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EnrolmentToken({}, …)", self.authority)
    }
}

impl FromStr for EnrolmentToken {
    type Err = TokenError;
    fn from_str(given: &str) -> Result<Self, TokenError> {
        let given = given.trim();
        let letters = given.get(PREFIX.len()..).ok_or(TokenError::Malformed)?;
        if !given[..PREFIX.len()].eq_ignore_ascii_case(PREFIX) {
            return Err(TokenError::Malformed);
        }
        let bytes = from_letters(letters).ok_or(TokenError::Mistyped)?;
        let (content, sum) = bytes.split_at_checked(BYTES - CHECK_LEN).ok_or(TokenError::Mistyped)?;
        if sum != check(content) {
            return Err(TokenError::Mistyped);
        }
        let (mut authority, mut secret) = ([0; Fingerprint::LEN], [0; 16]);
        authority.copy_from_slice(&content[..Fingerprint::LEN]);
        secret.copy_from_slice(&content[Fingerprint::LEN..]);
        Ok(Self { authority: Fingerprint::from_bytes(authority), secret })
    }
}

fn check(content: &[u8]) -> [u8; CHECK_LEN] {
    let digest = sha256(content);
    [digest[0], digest[1], digest[2], digest[3]]
}

/// Base32 as Crockford has it: no letter that looks like a digit.
fn to_letters(bytes: &[u8]) -> String {
    let (mut out, mut held, mut bits) = (String::with_capacity(LETTERS), 0u32, 0);
    for byte in bytes {
        held = held << 8 | u32::from(*byte);
        bits += 8;
        while bits >= 5 {
            bits -= 5;
            out.push(char::from(ALPHABET[(held >> bits & 31) as usize]));
        }
        held &= (1 << bits) - 1;
    }
    if bits > 0 {
        out.push(char::from(ALPHABET[(held << (5 - bits) & 31) as usize]));
    }
    out
}

fn from_letters(letters: &str) -> Option<Vec<u8>> {
    if letters.len() != LETTERS {
        return None;
    }
    let (mut out, mut held, mut bits) = (Vec::with_capacity(BYTES), 0u32, 0);
    for letter in letters.bytes() {
        let letter = match letter.to_ascii_uppercase() {
            b'O' => b'0',
            b'I' | b'L' => b'1',
            other => other,
        };
        let value = ALPHABET.iter().position(|known| *known == letter)?;
        held = held << 5 | value as u32;
        bits += 5;
        if bits >= 8 {
            bits -= 8;
            out.push((held >> bits) as u8);
            held &= (1 << bits) - 1;
        }
    }
    (held == 0).then_some(out)
}

const PREFIX: &str = "LB1-";
const ALPHABET: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
const CHECK_LEN: usize = 4;
const BYTES: usize = Fingerprint::LEN + 16 + CHECK_LEN;
const LETTERS: usize = (BYTES * 8).div_ceil(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_comes_back_from_its_letters_and_a_slip_is_noticed() {
        let token = EnrolmentToken {
            authority: Fingerprint::from_bytes(std::array::from_fn(|at| at as u8 * 7)),
            secret: std::array::from_fn(|at| 255 - at as u8),
        };
        let text = token.to_string();
        assert_eq!(text.len(), PREFIX.len() + LETTERS);
        assert_eq!(text.parse(), Ok(token.clone()));
        assert_eq!(format!(" {}\n", text.to_lowercase()).parse(), Ok(token.clone()));
        assert!(!format!("{token:?}").contains(&text[60..]));
        for at in PREFIX.len()..text.len() {
            let mut slip = text.clone().into_bytes();
            slip[at] = if slip[at] == b'7' { b'8' } else { b'7' };
            let slip = String::from_utf8(slip).unwrap();
            assert_eq!(slip.parse::<EnrolmentToken>(), Err(TokenError::Mistyped), "slip at {at}");
        }
        assert_eq!(text[..40].parse::<EnrolmentToken>(), Err(TokenError::Mistyped));
        for other in ["", "LB", "LB2-ABC", "sha256:00", "ü1-…", "LB1-ü"] {
            assert!(other.parse::<EnrolmentToken>().is_err(), "{other}");
        }
    }
}
