//! Name and hash of a model, by which files refer to the models that they were made with.

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::failure::Failure;

/// Another model that this one was made with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelId {
    /// As a user would write it.
    pub name: String,
    /// Of its weights, in hexadecimal.
    pub sha256: String,
}

impl ModelId {
    /// Refuses `found` in the place of `self`; `what` is the role, for example `base model`.
    ///
    /// # Errors
    /// [`Failure::Usage`] with both names.
    pub fn demand(&self, found: &Self, what: &str) -> Result<()> {
        if self.sha256 == found.sha256 {
            return Ok(());
        }
        let short = |id: &Self| id.sha256.chars().take(12).collect::<String>();
        Err(Failure::Usage(format!(
            "the hypernetwork was made for the {what} `{}` (SHA-256 {}…), not for `{}` ({}…)",
            self.name,
            short(self),
            found.name,
            short(found)
        ))
        .into())
    }
}
