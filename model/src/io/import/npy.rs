//! NumPy's `.npy`: one array, a header in Python's notation before its bytes.
//!
//! # Source
//! NumPy's documentation, `numpy.lib.format`, versions 1.0 to 3.0.

/// What every array begins with.
const MAGIC: &[u8] = b"\x93NUMPY";

/// An array, row-major.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Array {
    pub(super) shape: Vec<usize>,
    pub(super) data: Vec<f32>,
}

/// The kinds of numbers that weights come in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Element {
    F32,
    F64,
}

/// Reads an array of f32, or of f64, which is rounded.
///
/// # Errors
/// A sentence part that says what is wrong, as in "the tensor …".
pub(super) fn parse(file: &[u8]) -> Result<Array, String> {
    let (header, bytes) = split(file)?;
    let descr = value(header, "descr")?;
    let element = match descr.get(1..4) {
        Some("<f4") => Element::F32,
        Some("<f8") => Element::F64,
        _ => {
            return Err(format!("has element type {}, expected '<f4' or '<f8'", to_comma(descr)));
        }
    };
    let column_major = value(header, "fortran_order")?.starts_with("True");
    let shape = parse_shape(value(header, "shape")?)?;
    let size = match element {
        Element::F32 => 4,
        Element::F64 => 8,
    };
    let expected = shape.iter().try_fold(size, |product: usize, &n| product.checked_mul(n));
    if expected != Some(bytes.len()) {
        return Err(format!("is cut off or damaged: {} bytes for the shape {shape:?}", bytes.len()));
    }
    let data: Vec<f32> = match element {
        Element::F32 => bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
        Element::F64 => bytes.as_chunks::<8>().0.iter().map(|&b| f64::from_le_bytes(b) as f32).collect(),
    };
    let data = if column_major { row_major(&shape, &data) } else { data };
    Ok(Array { shape, data })
}

/// The header's text, and the bytes after it.
fn split(file: &[u8]) -> Result<(&str, &[u8]), String> {
    let rest = file.strip_prefix(MAGIC).ok_or("is not a .npy array")?;
    let cut = "is cut off inside its header";
    let (&[major, _minor], rest) = rest.split_first_chunk::<2>().ok_or(cut)?;
    let (length, rest) = if major == 1 {
        let (length, rest) = rest.split_first_chunk::<2>().ok_or(cut)?;
        (usize::from(u16::from_le_bytes(*length)), rest)
    } else {
        let (length, rest) = rest.split_first_chunk::<4>().ok_or(cut)?;
        (u32::from_le_bytes(*length) as usize, rest)
    };
    let (header, bytes) = rest.split_at_checked(length).ok_or(cut)?;
    let header = str::from_utf8(header).map_err(|_| "has a damaged header")?;
    Ok((header, bytes))
}

/// What stands behind a key of the header's dictionary.
fn value<'h>(header: &'h str, key: &str) -> Result<&'h str, String> {
    let quoted = format!("'{key}':");
    let (_, rest) = header.split_once(&quoted).ok_or_else(|| format!("has a header without {key}"))?;
    Ok(rest.trim_start())
}

fn to_comma(value: &str) -> &str {
    value.split(',').next().unwrap_or(value)
}

/// `(2, 3)`, `(2,)` or `()`.
fn parse_shape(value: &str) -> Result<Vec<usize>, String> {
    let inside = value.strip_prefix('(').and_then(|rest| rest.split_once(')'));
    let (inside, _) = inside.ok_or("has a header without a shape")?;
    let sizes = inside.split(',').map(str::trim).filter(|size| !size.is_empty());
    sizes.map(|size| size.parse().map_err(|_| format!("has a shape with {size:?} in it"))).collect()
}

/// Values whose first axis is the fastest, with the last as the fastest.
fn row_major(shape: &[usize], data: &[f32]) -> Vec<f32> {
    let place = |mut index: usize| {
        let (mut place, mut stride) = (0, data.len());
        for &size in shape.iter().rev() {
            stride /= size;
            place += index % size * stride;
            index /= size;
        }
        place
    };
    (0..data.len()).map(|index| data[place(index)]).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A file with that header dictionary (and NumPy's padding) before the bytes.
    pub(crate) fn file(header: &str, bytes: &[u8]) -> Vec<u8> {
        let mut header = header.to_owned();
        while !(MAGIC.len() + 4 + header.len() + 1).is_multiple_of(64) {
            header.push(' ');
        }
        header.push('\n');
        let length = u16::try_from(header.len()).unwrap().to_le_bytes();
        [MAGIC, &[1, 0], &length, header.as_bytes(), bytes].concat()
    }

    /// The file that `numpy.save` writes for f32 values.
    pub(crate) fn f32_file(shape: &[usize], data: &[f32]) -> Vec<u8> {
        let sizes: String = shape.iter().map(|n| format!("{n}, ")).collect();
        let header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({sizes}), }}");
        let bytes: Vec<u8> = data.iter().flat_map(|x| x.to_le_bytes()).collect();
        file(&header, &bytes)
    }

    #[test]
    fn shapes_orders_and_both_widths_are_read() {
        let data = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        for shape in [&[6][..], &[2, 3], &[1, 3, 2]] {
            let array = parse(&f32_file(shape, &data)).unwrap();
            assert_eq!((array.shape.as_slice(), array.data.as_slice()), (shape, &data[..]));
        }
        let doubles: Vec<u8> = data.iter().flat_map(|&x| f64::from(x).to_le_bytes()).collect();
        let header = "{'descr': '<f8', 'fortran_order': True, 'shape': (2, 3), }";
        assert_eq!(parse(&file(header, &doubles)).unwrap().data, [1.0, 3.0, 5.0, 2.0, 4.0, 6.0]);
        let scalar = "{'descr': '<f4', 'fortran_order': False, 'shape': (), }";
        assert_eq!(parse(&file(scalar, &1f32.to_le_bytes())).unwrap().data, [1.0]);
        let cube = "{'descr': '<f4', 'fortran_order': True, 'shape': (2, 1, 2), }";
        let bytes: Vec<u8> = data[..4].iter().flat_map(|x| x.to_le_bytes()).collect();
        assert_eq!(parse(&file(cube, &bytes)).unwrap().data, [1.0, 3.0, 2.0, 4.0]);
        assert!(parse(&f32_file(&[0, 3], &[])).unwrap().data.is_empty());
    }

    #[test]
    fn every_truncation_is_an_error() {
        let whole = f32_file(&[2, 2], &[1.0, 2.0, 3.0, 4.0]);
        for length in 0..whole.len() {
            assert!(parse(&whole[..length]).is_err(), "{length}");
        }
        assert!(parse(&whole[..whole.len() - 1]).unwrap_err().contains("[2, 2]"));
    }

    #[test]
    fn other_contents_are_named() {
        for (header, says) in [
            ("{'descr': '<i8', 'fortran_order': False, 'shape': (), }", "'<i8'"),
            ("{'descr': '>f4', 'fortran_order': False, 'shape': (), }", "'>f4'"),
            ("{'descr': '<f4', 'shape': (), }", "fortran_order"),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (x,), }", "\"x\""),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': 7, }", "without a shape"),
        ] {
            let error = parse(&file(header, &[0; 8])).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
        let huge =
            format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({0}, {0}), }}", usize::MAX / 2);
        assert!(parse(&file(&huge, &[0; 4])).is_err());
        assert!(parse(b"GIF89a").unwrap_err().contains("not a .npy"));
    }
}
