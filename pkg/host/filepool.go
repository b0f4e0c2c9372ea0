package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Probes read tens of thousands of small files a pass on a large host, and each
// read must be one that can be given up (see bound.go). A few long-lived
// goroutines make the calls and keep the memory they read into; one that hangs
// is left behind and replaced.

type fileOp uint8

const (
	opRead fileOp = iota
	opReadDir
	opReadLink
	opStat
	opLstat
	opRealPath
)

// String is the operation's name in errors.
func (o fileOp) String() string {
	return [...]string{"read", "readdir", "readlink", "stat", "lstat", "realpath"}[o]
}

type fileCall struct {
	op    fileOp
	name  string
	limit int64
}

type fileAnswer struct {
	data  []byte
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
	in      chan fileCall
	out     chan fileAnswer // room for one: the worker never waits
	given   bool            // up by its caller; guarded by the pool's mutex
	scratch []byte
}

// ask makes one call on a worker and waits for it as long as ctx allows.
func (r *Root) ask(ctx context.Context, c fileCall) fileAnswer {
	trace(ctx, c.name)
	w, err := r.hire(ctx, c)
	if err != nil {
		return fileAnswer{err: &fs.PathError{Op: c.op.String(), Path: c.name, Err: err}}
	}
	w.in <- c
	var limit <-chan time.Time
	if _, ok := ctx.Deadline(); !ok {
		timer := time.NewTimer(defaultLimit)
		defer timer.Stop()
		limit = timer.C
	}
	select {
	case a := <-w.out:
		return r.dismiss(w, a)
	case <-ctx.Done():
	case <-limit:
	}
	p := &r.files
	p.mu.Lock()
	select {
	case a := <-w.out:
		p.mu.Unlock()
		return r.dismiss(w, a)
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
	w := &fileWorker{in: make(chan fileCall, 1), out: make(chan fileAnswer, 1)}
	go r.serve(w)
	return w, nil
}

// dismiss puts a worker back whose answer was taken.
func (r *Root) dismiss(w *fileWorker, a fileAnswer) fileAnswer {
	p := &r.files
	p.mu.Lock()
	p.active--
	if p.closed || len(p.idle) >= maxIdle {
		close(w.in)
	} else {
		p.idle = append(p.idle, w)
	}
	p.mu.Unlock()
	return a
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
		close(w.in)
	}
	p.idle = nil
	return p.active == 0
}

func (r *Root) serve(w *fileWorker) {
	for c := range w.in {
		a, err := protect(func() (fileAnswer, error) { return r.answer(c, &w.scratch) })
		if err != nil {
			a = fileAnswer{err: &fs.PathError{Op: c.op.String(), Path: c.name, Err: err}}
		}
		p := &r.files
		p.mu.Lock()
		if w.given {
			delete(p.hung, c)
			p.active--
			p.mu.Unlock()
			return
		}
		w.out <- a
		p.mu.Unlock()
	}
}

func (r *Root) answer(c fileCall, scratch *[]byte) (a fileAnswer, err error) {
	switch c.op {
	case opRead:
		a.data, err = r.readFile(c.name, c.limit, scratch)
	case opReadDir:
		a.names, err = r.readDir(c.name)
	case opReadLink:
		a.text, err = r.readLink(c.name)
	case opStat:
		a.info, err = r.stat(c.name, unix.O_PATH)
	case opLstat:
		a.info, err = r.stat(c.name, unix.O_PATH|unix.O_NOFOLLOW)
	case opRealPath:
		a.text, err = r.realPath(c.name)
	}
	return a, err
}
