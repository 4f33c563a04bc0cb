//! Value parsers that options of several commands share.

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};

use crate::named::Named;

/// One of the values of an enum by its name; help lists the names and what they stand for.
pub fn named<T: Named + Send + Sync>() -> impl TypedValueParser<Value = T> {
    let value = |value: &T| PossibleValue::new(value.name()).help(value.about()).aliases(value.aliases());
    PossibleValuesParser::new(T::ALL.iter().map(value))
        .try_map(|name| T::from_name(&name).ok_or_else(|| format!("`{name}` is not one of them")))
}

/// A finite number of at most 10¹² in magnitude.
pub fn number(text: &str) -> Result<f64, String> {
    match text.trim().parse::<f64>() {
        Ok(number) if number.abs() <= 1e12 => Ok(number),
        Ok(number) if number.is_finite() => Err("it is at most 1e12 in magnitude".into()),
        _ => Err("it is a finite number".into()),
    }
}

/// Minutes from 0 to two thousand years.
pub fn minutes(text: &str) -> Result<f64, String> {
    number(text).ok().filter(|minutes| (0.0..=1e9).contains(minutes)).ok_or("it is a number from 0".into())
}

/// Pixels of a side.
pub fn pixels(text: &str) -> Result<usize, String> {
    match text.trim().parse() {
        Ok(pixels @ 1..=16_384) => Ok(pixels),
        _ => Err("it is a number of pixels from 1 to 16384".into()),
    }
}

/// A seed; -1 is a random one of 32 bits, which A1111's interfaces show whole.
pub fn seed(text: &str) -> Result<u64, String> {
    match text.trim() {
        "-1" => Ok(rand::random::<u32>().into()),
        text => {
            text.parse().map_err(|_| "a seed is a whole number from 0, or -1 for a random one".to_string())
        }
    }
}

/// Parses a learning rate above 0.
///
/// # Errors
/// The reason, which clap prints behind the name of the option.
pub fn learning_rate(text: &str) -> Result<f64, String> {
    let rate: f64 = text.parse().map_err(|_| "it is a number".to_string())?;
    if rate > 0.0 && rate.is_finite() { Ok(rate) } else { Err("it is more than 0".into()) }
}
