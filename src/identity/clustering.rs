//! Faces grouped by person.

use super::cosine;
use super::outliers::mean_direction;

/// [`groups`] with the cosine of each face to the mean direction of its group.
pub fn by_person(faces: &[Vec<f32>], threshold: f32) -> Vec<Vec<(usize, f32)>> {
    let with_cosines = |members: Vec<usize>| {
        let vectors: Vec<&[f32]> = members.iter().map(|&face| &faces[face][..]).collect();
        let centre = mean_direction(&vectors);
        members.into_iter().map(|face| (face, cosine(&faces[face], &centre))).collect()
    };
    groups(faces, threshold).into_iter().map(with_cosines).collect()
}

/// Groups of faces by person, each a list of places in `faces` (unit vectors); the largest group first, otherwise in
/// the order of their first face.
///
/// Average linkage: the two most alike groups are joined, as long as the mean cosine between the faces of one and
/// those of the other is `threshold` or more. Nearest-neighbour chains (Murtagh 1983) find the same groups in O(n²).
pub fn groups(faces: &[Vec<f32>], threshold: f32) -> Vec<Vec<usize>> {
    let mut alike: Vec<Vec<f32>> =
        faces.iter().map(|a| faces.iter().map(|b| cosine(a, b)).collect()).collect();
    let mut groups: Vec<Vec<usize>> = (0..faces.len()).map(|face| vec![face]).collect();
    // Groups that may still be joined, by the place of their first face.
    let mut open: Vec<usize> = (0..faces.len()).collect();
    let mut chain: Vec<usize> = Vec::new();
    while let Some(&last) = chain.last().or(open.first()) {
        if chain.is_empty() {
            chain.push(last);
        }
        let before = chain.len().checked_sub(2).map(|at| chain[at]);
        // Of equals the one before is taken, so that the chain ends.
        let nearest = open.iter().copied().filter(|&other| other != last).max_by(|&a, &b| {
            let by_cosine = alike[last][a].total_cmp(&alike[last][b]);
            by_cosine.then((Some(a) == before).cmp(&(Some(b) == before)))
        });
        match nearest.filter(|&nearest| alike[last][nearest] >= threshold) {
            // Nothing is alike enough: the group is whole, and nothing that joins later comes nearer to it.
            None => {
                open.retain(|&group| group != last);
                chain.pop();
            }
            Some(nearest) if Some(nearest) == before => {
                chain.truncate(chain.len() - 2);
                let (into, from) = (last.min(nearest), last.max(nearest));
                let members = std::mem::take(&mut groups[from]);
                let (n, m) = (groups[into].len() as f32, members.len() as f32);
                groups[into].extend(members);
                open.retain(|&group| group != from);
                for &other in &open {
                    let mean = (n * alike[into][other] + m * alike[from][other]) / (n + m);
                    (alike[into][other], alike[other][into]) = (mean, mean);
                }
            }
            Some(nearest) => chain.push(nearest),
        }
    }
    groups.retain(|group| !group.is_empty());
    groups.iter_mut().for_each(|group| group.sort_unstable());
    groups.sort_by_key(|group| (std::cmp::Reverse(group.len()), group[0]));
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Unit vectors at these angles, in degrees.
    fn at(angles: &[f32]) -> Vec<Vec<f32>> {
        angles.iter().map(|angle| vec![angle.to_radians().cos(), angle.to_radians().sin()]).collect()
    }

    #[test]
    fn people_are_told_apart_in_any_order() {
        let order = at(&[0.0, 80.0, 10.0, 85.0, -5.0, 180.0]);
        assert_eq!(groups(&order, 0.8), [vec![0, 2, 4], vec![1, 3], vec![5]]);
        assert_eq!(groups(&at(&[0.0, 40.0, 10.0, 30.0]), 0.85), [[0, 1, 2, 3]]);
        assert_eq!(groups(&at(&[7.0; 5]), 1.0 - 1e-6), [[0, 1, 2, 3, 4]]);
        assert_eq!(groups(&[], 0.5), Vec::<Vec<usize>>::new());
    }

    #[test]
    fn a_face_between_two_people_does_not_join_them() {
        // Single linkage would put all into one group: each step of 30° has cosine 0.87.
        assert_eq!(groups(&at(&[0.0, 4.0, 30.0, 60.0, 64.0]), 0.8).len(), 2);
    }

    #[test]
    fn chains_find_the_groups_of_the_plain_algorithm() {
        let mut state = 7u64;
        let mut draw = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1 << 24) as f32 - 0.5
        };
        for round in 0..20 {
            let faces: Vec<Vec<f32>> = (0..30)
                .map(|_| {
                    let vector: Vec<f32> = (0..3).map(|_| draw()).collect();
                    mean_direction(&[vector])
                })
                .collect();
            let mut plain: Vec<Vec<usize>> = (0..faces.len()).map(|face| vec![face]).collect();
            let mean = |a: &[usize], b: &[usize]| {
                let sum: f32 = a
                    .iter()
                    .flat_map(|&x| b.iter().map(move |&y| (x, y)))
                    .map(|(x, y)| cosine(&faces[x], &faces[y]))
                    .sum();
                sum / (a.len() * b.len()) as f32
            };
            loop {
                let pairs = (0..plain.len()).flat_map(|a| (a + 1..plain.len()).map(move |b| (a, b)));
                let best = pairs
                    .max_by(|x, y| mean(&plain[x.0], &plain[x.1]).total_cmp(&mean(&plain[y.0], &plain[y.1])));
                match best {
                    Some((a, b)) if mean(&plain[a], &plain[b]) >= 0.6 => {
                        let members = plain.remove(b);
                        plain[a].extend(members);
                    }
                    _ => break,
                }
            }
            plain.iter_mut().for_each(|group| group.sort_unstable());
            plain.sort_by_key(|group| (std::cmp::Reverse(group.len()), group[0]));
            assert_eq!(groups(&faces, 0.6), plain, "round {round}");
        }
    }
}
