package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Probes read tens of thousands of small files a pass on a large host, and each
// read of what may hang must be one that can be given up (see bound.go). A few
// long-lived goroutines make those calls and keep the memory they read into; one
// that hangs is left behind and replaced.

type fileOp uint8

const (
	opRead fileOp = iota
	opReadThrough
	opReadAttributes
	opReadDir
	opReadLink
	opReadLinks
	opStat
	opLstat
	opRealPath
	opCertificates
)

// String is the operation's name in errors.
func (o fileOp) String() string {
	return [...]string{"read", "read", "read", "readdir", "readlink", "readlink", "stat", "lstat", "realpath", "read"}[o]
}

type fileCall struct {
	op    fileOp
	name  string
	limit int64
}

type fileAnswer struct {
	data  []byte
	attrs []Attribute
	links []Link
	certs [][]byte
	names []string
	text  string
	info  FileInfo
	err   error
}

// filePool holds the goroutines of one tree.
type filePool struct {
	mu     sync.Mutex
	idle   []*fileWorker
	active int // calls under way, hanging ones included
	hung   map[fileCall]time.Time
	closed bool
}

// maxIdle is enough for the probes that run at a time.
const maxIdle = 8

type fileWorker struct {
	in      chan fileCall // nil until the goroutine is needed
	names   []string      // what to read below the directory of the call
	each    func([]byte)  // who gets the pieces of the file
	out     chan struct{} // room for one: the worker never waits
	answer  fileAnswer    // read by the caller once out has told
	given   bool          // up by its caller; guarded by the pool's mutex
	scratch []byte
}

// inMemory tells the calls that are made by the caller himself: handing one over
// costs as much as the call (5 us of 10 where a second processor is woken for
// it), and these the kernel answers from its own memory, whatever state a device
// or a server is in. They are attributes in sysfs and control groups, sysctls, and
// what procfs tells of the machine and of a process but its memory (cmdline,
// environ), which may be on a dead disk. Left out are what else is known to wait:
// mount tables, which wait for whoever mounts, binfmt_misc, which is mounted when it
// is looked at, and md's attributes, which take the lock of an array that may be stuck.
// Should the kernel hang in one all the same, its probe hangs and is told by the
// engine with the name of the file, and all others go on.
func (r *Root) inMemory(c fileCall) bool {
	if strings.Contains(c.name, "..") {
		return false
	}
	if rest, ok := strings.CutPrefix(c.name, "/sys/"); ok {
		return r.sysInMemory && !strings.Contains(rest, "/md")
	}
	if rest, ok := strings.CutPrefix(c.name, "/proc/"); ok && r.procInMemory && !strings.HasPrefix(rest, "sys/fs/binfmt_misc") {
		switch rest[strings.LastIndexByte(rest, '/')+1:] {
		case "oom_score", "oom_score_adj", "cgroup", "stat", "status", "comm", "ns":
			return true
		case "loadavg", "meminfo", "vmstat", "partitions":
			return true
		}
		return strings.HasPrefix(rest, "sys/")
	}
	return false
}

// memoryOnly reports whether a directory lies on a file system without anything
// behind it, and whether on the one it is called after. A copied tree may lie
// anywhere.
func (r *Root) memoryOnly(dir string, called int64) (memory, itself bool) {
	fd, err := r.open(dir, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return false, false
	}
	defer unix.Close(fd)
	var st unix.Statfs_t
	if unix.Fstatfs(fd, &st) != nil {
		return false, false
	}
	switch int64(st.Type) {
	case called:
		return true, true
	case unix.TMPFS_MAGIC, unix.RAMFS_MAGIC:
		return true, false
	}
	return false, false
}

// ask makes one call, on a worker unless it is inMemory, and waits for it as long as ctx allows.
func (r *Root) ask(ctx context.Context, c fileCall, names ...string) fileAnswer {
	return r.askFor(ctx, c, names, nil)
}

func (r *Root) askFor(ctx context.Context, c fileCall, names []string, each func([]byte)) fileAnswer {
	trace(ctx, c.name)
	w, err := r.hire(ctx, c)
	if err != nil {
		return fileAnswer{err: &fs.PathError{Op: c.op.String(), Path: c.name, Err: err}}
	}
	w.names, w.each = names, each
	if r.inMemory(c) {
		if err := r.answer(c, w); err != nil {
			w.answer = fileAnswer{err: &fs.PathError{Op: c.op.String(), Path: c.name, Err: err}}
		}
		return r.dismiss(w)
	}
	if w.in == nil {
		w.in, w.out = make(chan fileCall, 1), make(chan struct{}, 1)
		go r.serve(w)
	}
	w.in <- c
	var limit <-chan time.Time
	if _, ok := ctx.Deadline(); !ok {
		timer := time.NewTimer(defaultLimit)
		defer timer.Stop()
		limit = timer.C
	}
	select {
	case <-w.out:
		return r.dismiss(w)
	case <-ctx.Done():
	case <-limit:
	}
	p := &r.files
	p.mu.Lock()
	select {
	case <-w.out:
		p.mu.Unlock()
		return r.dismiss(w)
	default:
	}
	w.given = true
	if p.hung == nil {
		p.hung = map[fileCall]time.Time{}
	}
	if _, ok := p.hung[c]; !ok {
		p.hung[c] = time.Now()
	}
	p.mu.Unlock()
	err = ErrNoReply
	if errors.Is(ctx.Err(), context.Canceled) {
		err = context.Canceled
	}
	return fileAnswer{err: &fs.PathError{Op: c.op.String(), Path: c.name, Err: err}}
}

// hire takes an idle worker or starts one.
func (r *Root) hire(ctx context.Context, c fileCall) (*fileWorker, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	p := &r.files
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.closed:
		return nil, fs.ErrClosed
	case len(p.hung) >= maxHanging:
		return nil, ErrTooManyHanging
	}
	if len(p.hung) > 0 {
		if since, ok := p.hung[c]; ok && time.Since(since) > hangsAfter {
			return nil, fmt.Errorf("%w since %s", ErrNoReply, since.UTC().Format(time.RFC3339))
		}
	}
	p.active++
	if n := len(p.idle); n > 0 {
		w := p.idle[n-1]
		p.idle = p.idle[:n-1]
		return w, nil
	}
	return &fileWorker{}, nil
}

// dismiss puts a worker back whose answer was taken.
func (r *Root) dismiss(w *fileWorker) fileAnswer {
	a := w.answer
	w.answer, w.names, w.each = fileAnswer{}, nil, nil
	p := &r.files
	p.mu.Lock()
	p.active--
	if p.closed || len(p.idle) >= maxIdle {
		w.end()
	} else {
		p.idle = append(p.idle, w)
	}
	p.mu.Unlock()
	return a
}

func (w *fileWorker) end() {
	if w.in != nil {
		close(w.in)
	}
}

// close ends the idle workers and tells whether no call is under way.
func (p *filePool) close() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return false
	}
	p.closed = true
	for _, w := range p.idle {
		w.end()
	}
	p.idle = nil
	return p.active == 0
}

func (r *Root) serve(w *fileWorker) {
	for c := range w.in {
		if err := r.answer(c, w); err != nil {
			w.answer = fileAnswer{err: &fs.PathError{Op: c.op.String(), Path: c.name, Err: err}}
		}
		p := &r.files
		p.mu.Lock()
		if w.given {
			delete(p.hung, c)
			p.active--
			p.mu.Unlock()
			return
		}
		w.out <- struct{}{}
		p.mu.Unlock()
	}
}

// answer makes a call. A panic is an error, as in protect, without its closure.
func (r *Root) answer(c fileCall, w *fileWorker) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v", p)
		}
	}()
	a := &w.answer
	switch c.op {
	case opRead:
		a.data, err = r.readFile(c.name, c.limit, &w.scratch)
	case opReadThrough:
		err = r.readThrough(c.name, c.limit, &w.scratch, w.each)
	case opReadAttributes:
		a.attrs = r.readAttributes(c.name, w.names, &w.scratch)
	case opReadDir:
		a.names, err = r.readDir(c.name, &w.scratch)
	case opReadLink:
		a.text, err = r.readLink(c.name)
	case opReadLinks:
		a.links = r.readLinks(c.name, w.names)
	case opStat:
		a.info, err = r.stat(c.name, unix.O_PATH)
	case opLstat:
		a.info, err = r.stat(c.name, unix.O_PATH|unix.O_NOFOLLOW)
	case opRealPath:
		a.text, err = r.realPath(c.name)
	case opCertificates:
		a.certs, err = r.readCertificates(c.name)
	}
	return err
}
