//! Soft shapes: coverage from signed distances, Gaussians, ellipses.

/// From `low`, at 0, to `high`, at 1.
pub(super) fn between(low: f32, high: f32, share: f32) -> f32 {
    low + (high - low) * share
}

/// How much of a pixel lies inside a shape: 1 well inside, 0 well outside, over a width of `edge`.
pub(super) fn coverage(distance: f32, edge: f32) -> f32 {
    (0.5 - distance / edge).clamp(0.0, 1.0)
}

/// Coverage by the band of half-width `half` around a line; right for bands thinner than a pixel too.
pub(super) fn band(distance: f32, half: f32, edge: f32) -> f32 {
    coverage(distance - half, edge) - coverage(distance + half, edge)
}

/// Gaussian of the given width: `exp(−(d / width)²)`.
pub(super) fn hill(distance: f32, width: f32) -> f32 {
    let scaled = distance / width;
    if scaled.abs() > 3.0 { 0.0 } else { (-scaled * scaled).exp() }
}

/// Gaussian in two directions.
pub(super) fn bump(x: f32, width: f32, y: f32, height: f32) -> f32 {
    let (x, y) = (x / width, y / height);
    let squared = x * x + y * y;
    if squared > 9.0 { 0.0 } else { (-squared).exp() }
}

/// Distance to an ellipse around the origin, exact on the outline.
pub(super) fn ellipse(x: f32, y: f32, width: f32, height: f32) -> f32 {
    ((x / width).hypot(y / height) - 1.0) * width.min(height)
}
