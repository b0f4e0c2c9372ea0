package config

import (
	"context"
	"crypto/sha256"
	"errors"
	"io/fs"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
)

// Watch reads a config file and calls onChange with what it says, then again
// each time its content has changed, until ctx ends. A file that is not there,
// or was removed, is the defaults: the zero Config and no error. With an error
// (Problems, or that the file can not be read) the Config is nil, and which one
// stays in force is the caller's to decide. Calls come one after another, and
// never two for the same content.
//
// Changes are noticed by inotify on the directory, because that is where they
// happen: the kubelet swaps the symlink ..data beside the files of a ConfigMap
// (kubernetes/pkg/volume/util/atomic_writer.go), and editors rename a new file
// into place. The file is read every minute besides, for what inotify does
// not tell: no instances left (fs.inotify.max_user_instances), a directory that
// was itself replaced, a symlink's target in another directory.
func Watch(ctx context.Context, file string, onChange func(*Config, error)) {
	watcher{file: file, poll: time.Minute, settle: 200 * time.Millisecond, listen: fsnotify.NewWatcher}.run(ctx, onChange)
}

type watcher struct {
	file string
	// poll is how often the file is read without any event.
	poll time.Duration
	// settle is how long after the first event the file is read: a swap is
	// several, and a plain write may be seen half done. Later events do not
	// push it back, or a busy directory would do so for ever.
	settle time.Duration
	listen func() (*fsnotify.Watcher, error)
}

func (w watcher) run(ctx context.Context, onChange func(*Config, error)) {
	dir := filepath.Dir(w.file)
	// Nil channels never deliver: without inotify only the ticker wakes.
	var events chan fsnotify.Event
	var failures chan error
	notify, err := w.listen()
	if err == nil {
		defer notify.Close()
		events, failures = notify.Events, notify.Errors
	}
	// watch is asked again on every poll: adding a directory that is watched
	// already changes nothing, and one that was replaced is found again.
	watch := func() {
		if notify != nil {
			_ = notify.Add(dir) // when it fails there is the poll
		}
	}

	// Watched before read: a change between the two is an event, not lost.
	watch()
	last := ""
	check := func() {
		if state, parse := w.read(); state != last {
			last = state
			onChange(parse())
		}
	}
	check()

	ticker := time.NewTicker(w.poll)
	defer ticker.Stop()
	var settled <-chan time.Time
	soon := func() {
		if settled == nil {
			settled = time.After(w.settle)
		}
	}
	for {
		select {
		case <-ctx.Done():
			return
		case _, ok := <-events:
			if !ok {
				events = nil
				continue
			}
			soon()
		case _, ok := <-failures:
			// An overflown queue has lost events: look for ourselves.
			if !ok {
				failures = nil
				continue
			}
			soon()
		case <-settled:
			settled = nil
			check()
		case <-ticker.C:
			watch()
			check()
		}
	}
}

// read reads the file. state is the same for the same content or failure.
func (w watcher) read() (state string, parse func() (*Config, error)) {
	data, err := read(w.file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "absent", func() (*Config, error) { return &Config{}, nil }
	case err != nil:
		return "error " + err.Error(), func() (*Config, error) { return nil, err }
	}
	sum := sha256.Sum256(data)
	return "content " + string(sum[:]), func() (*Config, error) { return Parse(w.file, data) }
}
