//! `docker run` of the demo's image: thin on the plugin against normal on overlay2, both warm.

use anyhow::{Result, ensure};

use super::{Goal, Line};
use crate::scene::{Engines, Steps, Subject, debian_image, timed};

const ROUNDS: usize = 9;

/// Measures; needs root.
pub fn measure() -> Result<Vec<Line>> {
    let mut steps = Steps::default();
    let subject = Subject::debian_python();
    let what = "make a Debian root file system with Python";
    let Engines { source, plain, engine, .. } = &Engines::start(&mut steps, what, debian_image)?;
    let normal = || timed(plain, &subject.start_arguments(&source.normal));
    let thin = || timed(&engine.dockerd, &subject.start_arguments(&source.thin));
    let (one, other) = steps.step("start both once", || Ok((normal()?, thin()?)))?;
    ensure!(one.0 == other.0, "the containers printed different things");
    let mut rounds = Vec::new();
    for round in 0..ROUNDS {
        rounds.push(if round % 2 == 0 {
            let first = normal()?.1;
            (first, thin()?.1)
        } else {
            let second = thin()?.1;
            (normal()?.1, second)
        });
    }
    Ok(vec![Line::new("docker run, warm", "s", Goal::AtMost(1.5), &rounds)])
}
