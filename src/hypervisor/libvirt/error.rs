//! libvirt's errors, by what the caller must do about them; libvirt's own words are kept.

use virt::error::{Error, ErrorNumber};

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HypervisorError {
    /// There is no such domain: wait for it, or drop it.
    #[error("{what}: no such domain ({words})")]
    NotFound { what: String, words: String },
    /// libvirtd can't be reached or went away in the middle: try again; what was asked may or may not have happened.
    #[error("{what}: libvirt can't be reached ({words})")]
    ConnectionLost { what: String, words: String },
    /// The domain is in a state in which this can't be done (shut off, say).
    #[error("{what}: not possible now ({words})")]
    WrongState { what: String, words: String },
    /// libvirt understood and refused, or failed at it.
    #[error("{what}: libvirt refused ({words})")]
    Refused { what: String, words: String },
}

impl HypervisorError {
    pub(super) fn from_virt(what: &str, error: &Error, alive: bool) -> Self {
        let (what, words) = (what.to_owned(), error.message().to_owned());
        if !alive {
            return Self::ConnectionLost { what, words };
        }
        let is = |number: ErrorNumber| error.code() == number.into();
        if is(ErrorNumber::NoDomain) || is(ErrorNumber::NoNetwork) {
            Self::NotFound { what, words }
        } else if is(ErrorNumber::OperationInvalid) {
            Self::WrongState { what, words }
        } else if is(ErrorNumber::NoConnect) || is(ErrorNumber::InvalidConn) || is(ErrorNumber::Rpc) {
            Self::ConnectionLost { what, words }
        } else {
            Self::Refused { what, words }
        }
    }
}
