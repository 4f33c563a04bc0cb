//! The few functions of oneDNN that multiply matrices: <https://uxlfoundation.github.io/oneDNN/> describes them.
//!
//! The library is opened when first wanted, from `$ONEDNN_ROOT/lib` or wherever the system looks for libraries. One of
//! another major version is refused, and so is one for TBB or SYCL, whose threads we could not forbid.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::ptr::null_mut;
use std::sync::{Once, OnceLock};

use candle_core::{Result, bail};

#[cfg(not(all(target_arch = "x86_64", target_os = "linux", target_env = "gnu")))]
compile_error!("the feature `onednn` is for x86-64 Linux with glibc");

/// `out[i, j] = Σ left[i, k] · right[k, j]`, of bf16 in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in crate::layers) struct Product {
    pub rows: usize,
    pub columns: usize,
    /// A multiple of 32.
    pub depth: usize,
}

/// Any object of oneDNN.
type Handle = *mut c_void;
type Destroy = unsafe extern "C" fn(Handle) -> c_int;
/// As many as there are dimensions are read.
type Dims = *const [i64; 2];

// Numbers of `dnnl_types.h`, the same in 3.2 and 3.13.
const CPU: c_int = 1;
const IN_ORDER: c_uint = 1;
const BF16: c_int = 2;
const F32: c_int = 3;
/// `dnnl_ab`.
const ROW_BY_ROW: c_int = 3;
/// Panels of 32 columns, pairs along the depth side by side: `dnnl_BA16a32b2a`.
const PANELS: c_int = 382;
const SOURCE: c_int = 1;
const WEIGHTS: c_int = 33;
const DESTINATION: c_int = 17;
/// Sizes of products for which a thread keeps oneDNN's objects.
const MOST_MATMULS: usize = 1024;
/// Runtimes that run in the calling thread alone if asked to: none, OpenMP, and a pool that it is not given.
const RUNTIMES: [c_uint; 3] = [1, 2, 8];

#[repr(C)]
struct Version {
    major: c_int,
    minor: c_int,
    patch: c_int,
    hash: *const c_char,
    cpu_runtime: c_uint,
    gpu_runtime: c_uint,
}

#[repr(C)]
struct Argument {
    which: c_int,
    memory: Handle,
}

macro_rules! functions {
    ($($name:ident($($type:ty),*);)*) => {
        /// The library's functions `dnnl_…`; each returns 0 or says what was wrong.
        struct Functions {
            $($name: unsafe extern "C" fn($($type),*) -> c_int,)*
            /// OpenMP's, where the library uses it.
            set_threads: Option<unsafe extern "C" fn(c_int)>,
        }

        impl Functions {
            /// # Safety
            /// `library` is oneDNN 3.
            unsafe fn of(library: Handle) -> Result<Self> {
                // SAFETY: oneDNN 3 and OpenMP declare the functions so.
                unsafe {
                    Ok(Self {
                        $($name: std::mem::transmute::<Handle, unsafe extern "C" fn($($type),*) -> c_int>(
                            symbol(library, concat!("dnnl_", stringify!($name)))?
                        ),)*
                        set_threads: symbol(library, "omp_set_num_threads")
                            .ok()
                            .map(|found| std::mem::transmute::<Handle, unsafe extern "C" fn(c_int)>(found)),
                    })
                }
            }
        }
    };
}

functions! {
    engine_create(*mut Handle, c_int, usize);
    engine_destroy(Handle);
    stream_create(*mut Handle, Handle, c_uint);
    stream_destroy(Handle);
    stream_wait(Handle);
    memory_desc_create_with_tag(*mut Handle, c_int, Dims, c_int, c_int);
    memory_desc_destroy(Handle);
    memory_create(*mut Handle, Handle, Handle, Handle);
    memory_set_data_handle(Handle, Handle);
    memory_destroy(Handle);
    matmul_primitive_desc_create(*mut Handle, Handle, Handle, Handle, Handle, Handle, Handle);
    primitive_desc_destroy(Handle);
    primitive_create(*mut Handle, Handle);
    primitive_execute(Handle, Handle, c_int, *const Argument);
    primitive_destroy(Handle);
}

/// # Safety
/// `library` was opened by `dlopen`.
unsafe fn symbol(library: Handle, name: &str) -> Result<Handle> {
    let name = CString::new(name).map_err(candle_core::Error::wrap)?;
    // SAFETY: the name ends with zero.
    let found = unsafe { libc::dlsym(library, name.as_ptr()) };
    if found.is_null() {
        bail!("it has no function {name:?}");
    }
    Ok(found)
}

fn open() -> Result<Functions> {
    let file = "libdnnl.so.3"; // The name holds the major version.
    let path = match std::env::var("ONEDNN_ROOT") {
        Ok(root) => format!("{root}/lib/{file}"),
        Err(_) => file.to_string(),
    };
    let name = CString::new(path.as_str()).map_err(candle_core::Error::wrap)?;
    // SAFETY: opening a library runs its initialisers; oneDNN's and those of its runtime are harmless. It is never closed.
    let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if library.is_null() {
        // SAFETY: after a failure `dlerror` is a string that lasts until the next call in this thread.
        let why = unsafe { CStr::from_ptr(libc::dlerror()) };
        bail!("{}; ONEDNN_ROOT names the folder that holds lib/{file}", why.to_string_lossy());
    }
    // SAFETY: all versions since 1 have this function, and these fields since 2.
    let version = unsafe {
        let version: unsafe extern "C" fn() -> *const Version =
            std::mem::transmute(symbol(library, "dnnl_version")?);
        &*version()
    };
    let Version { major, minor, cpu_runtime, .. } = version;
    if *major != 3 {
        bail!("{path} is version {major}.{minor}, and version 3 is wanted");
    }
    if !RUNTIMES.contains(cpu_runtime) {
        bail!("{path} was built for TBB or SYCL, and one for OpenMP is wanted");
    }
    // SAFETY: it is version 3.
    unsafe { Functions::of(library) }
}

/// The library, opened by the first call.
fn functions() -> Option<&'static Functions> {
    static FUNCTIONS: OnceLock<Option<Functions>> = OnceLock::new();
    FUNCTIONS.get_or_init(|| open().map_err(warn).ok()).as_ref()
}

/// Tells the first error alone: our own kernels go on.
fn warn(error: candle_core::Error) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| eprintln!("warning: oneDNN is not used: {error}"));
}

/// Whether there is a library that can be used.
pub(in crate::layers) fn is_there() -> bool {
    functions().is_some()
}

/// Computes a product; `false` where oneDNN cannot, and the contents of `out` are undefined then.
///
/// `left` lies row by row; `right` in panels of 32 columns that follow each other, pairs along the depth side by side;
/// `out` row by row.
pub(in crate::layers) fn multiply(product: Product, left: &[u32], right: &[u32], out: &mut [f32]) -> bool {
    let Product { rows, columns, depth } = product;
    assert!(depth.is_multiple_of(32) && left.len() >= rows * depth / 2);
    assert!(right.len() >= columns.next_multiple_of(32) * depth / 2 && out.len() >= rows * columns);
    thread_local! {
        static WORKER: RefCell<Option<Worker>> = const { RefCell::new(None) };
    }
    let done = WORKER.with_borrow_mut(|worker| {
        let Some(functions) = functions() else { return Ok(false) };
        let worker = match worker {
            Some(worker) => worker,
            None => worker.insert(Worker::new(functions)?),
        };
        // SAFETY: the operands and the output are as large as the product.
        unsafe { worker.multiply(product, left.as_ptr(), right.as_ptr(), out.as_mut_ptr()) }.map(|()| true)
    });
    done.map_err(warn).unwrap_or(false)
}

/// An object that is destroyed with its owner.
struct Owned {
    handle: Handle,
    destroy: Destroy,
}

impl Owned {
    fn new(destroy: Destroy, create: impl FnOnce(*mut Handle) -> c_int) -> Result<Self> {
        let mut handle = null_mut();
        checked(create(&mut handle))?;
        Ok(Self { handle, destroy })
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: the handle is this object's own and is not used from here on.
        unsafe { (self.destroy)(self.handle) };
    }
}

fn checked(status: c_int) -> Result<()> {
    if status != 0 {
        bail!("a call of oneDNN failed with status {status}");
    }
    Ok(())
}

/// State of one thread. oneDNN itself shares compiled kernels among threads.
struct Worker {
    // In the order in which they are destroyed.
    matmuls: HashMap<Product, Matmul>,
    stream: Owned,
    engine: Owned,
    functions: &'static Functions,
}

/// A product of one size, and what it reads and writes.
struct Matmul {
    primitive: Owned,
    left: Owned,
    right: Owned,
    out: Owned,
}

impl Worker {
    fn new(functions: &'static Functions) -> Result<Self> {
        let f = functions;
        if let Some(set_threads) = f.set_threads {
            // SAFETY: it sets the number of threads that this thread may use.
            unsafe { set_threads(1) };
        }
        // SAFETY: the arguments are what the functions are documented to take.
        let (engine, stream) = unsafe {
            let engine = Owned::new(f.engine_destroy, |to| (f.engine_create)(to, CPU, 0))?;
            let stream = Owned::new(f.stream_destroy, |to| (f.stream_create)(to, engine.handle, IN_ORDER))?;
            (engine, stream)
        };
        Ok(Self { matmuls: HashMap::new(), stream, engine, functions })
    }

    /// # Safety
    /// `left`, `right` and `out` are as [`multiply`] has them.
    unsafe fn multiply(
        &mut self,
        product: Product,
        left: *const u32,
        right: *const u32,
        out: *mut f32,
    ) -> Result<()> {
        if !self.matmuls.contains_key(&product) {
            if self.matmuls.len() == MOST_MATMULS {
                self.matmuls.clear();
            }
            self.matmuls.insert(product, self.matmul(product)?);
        }
        let (f, matmul) = (self.functions, &self.matmuls[&product]);
        let arguments = [
            Argument { which: SOURCE, memory: matmul.left.handle },
            Argument { which: WEIGHTS, memory: matmul.right.handle },
            Argument { which: DESTINATION, memory: matmul.out.handle },
        ];
        // SAFETY: the handles are alive, and the caller's promise is what the product reads and writes.
        unsafe {
            checked((f.memory_set_data_handle)(matmul.left.handle, left.cast_mut().cast()))?;
            checked((f.memory_set_data_handle)(matmul.right.handle, right.cast_mut().cast()))?;
            checked((f.memory_set_data_handle)(matmul.out.handle, out.cast()))?;
            let (primitive, stream) = (matmul.primitive.handle, self.stream.handle);
            checked((f.primitive_execute)(primitive, stream, arguments.len() as c_int, arguments.as_ptr()))?;
            checked((f.stream_wait)(stream))
        }
    }

    fn matmul(&self, product: Product) -> Result<Matmul> {
        let (f, engine) = (self.functions, self.engine.handle);
        let [rows, columns, depth] = [product.rows, product.columns, product.depth].map(|size| size as i64);
        // SAFETY: the arguments are what the functions are documented to take, and alive while they run.
        unsafe {
            let matrix = |dims: [i64; 2], kind: c_int, format: c_int| {
                Owned::new(f.memory_desc_destroy, |to| {
                    (f.memory_desc_create_with_tag)(to, 2, &dims, kind, format)
                })
            };
            let left = matrix([rows, depth], BF16, ROW_BY_ROW)?;
            let right = matrix([depth, columns], BF16, PANELS)?;
            let out = matrix([rows, columns], F32, ROW_BY_ROW)?;
            let description = Owned::new(f.primitive_desc_destroy, |to| {
                let (none, [left, right, out]) =
                    (null_mut(), [&left, &right, &out].map(|matrix| matrix.handle));
                (f.matmul_primitive_desc_create)(to, engine, left, right, none, out, none)
            })?;
            let memory = |matrix: &Owned| {
                Owned::new(f.memory_destroy, |to| (f.memory_create)(to, matrix.handle, engine, null_mut()))
            };
            Ok(Matmul {
                primitive: Owned::new(f.primitive_destroy, |to| {
                    (f.primitive_create)(to, description.handle)
                })?,
                left: memory(&left)?,
                right: memory(&right)?,
                out: memory(&out)?,
            })
        }
    }
}
