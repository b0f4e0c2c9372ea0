package rig

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// CacheDir is where expensive products are kept: HYGIENE_CACHE, or the folder
// "host-hygiene" in the user's cache folder.
func CacheDir() (string, error) {
	base := os.Getenv("HYGIENE_CACHE")
	if base == "" {
		var err error
		if base, err = os.UserCacheDir(); err != nil {
			return "", fmt.Errorf("finding a cache folder (set HYGIENE_CACHE): %w", err)
		}
	}
	// A relative path would change its meaning with the working folder, and go
	// test runs each package in its own.
	base, err := filepath.Abs(base)
	if err != nil {
		return "", fmt.Errorf("finding the cache folder: %w", err)
	}
	return filepath.Join(base, "host-hygiene"), nil
}

// cached returns the folder CACHE/kind/key, having make fill it if it does not
// exist. make fills a folder that is renamed only when it succeeded, and one
// process at a time does it: a second one waits and finds the work done.
func cached(ctx context.Context, kind, key string, make func(ctx context.Context, dir string) error) (string, error) {
	cache, err := CacheDir()
	if err != nil {
		return "", err
	}
	parent := filepath.Join(cache, kind)
	final := filepath.Join(parent, key)
	if exists(final) {
		return final, nil
	}
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return "", fmt.Errorf("creating the cache: %w", err)
	}
	unlock, err := lock(ctx, filepath.Join(parent, ".lock"))
	if err != nil {
		return "", err
	}
	defer unlock()
	if exists(final) {
		return final, nil
	}
	// Whoever held the lock before us may have been killed half way.
	stale, err := filepath.Glob(filepath.Join(parent, ".new-*"))
	if err != nil {
		return "", fmt.Errorf("looking for unfinished work: %w", err)
	}
	for _, dir := range stale {
		if err := os.RemoveAll(dir); err != nil {
			return "", fmt.Errorf("removing unfinished work: %w", err)
		}
	}
	work, err := os.MkdirTemp(parent, ".new-")
	if err != nil {
		return "", fmt.Errorf("creating a work folder: %w", err)
	}
	defer os.RemoveAll(work)
	if err := os.Chmod(work, 0o755); err != nil {
		return "", fmt.Errorf("opening the work folder to other users: %w", err)
	}
	if err := make(ctx, work); err != nil {
		return "", err
	}
	if err := os.Rename(work, final); err != nil {
		return "", fmt.Errorf("publishing %s: %w", final, err)
	}
	return final, prune(parent, 3)
}

// prune keeps the newest products of a kind. Each weighs hundreds of megabytes
// and every change of the recipe makes another.
func prune(parent string, keep int) error {
	entries, err := os.ReadDir(parent)
	if err != nil {
		return fmt.Errorf("reading the cache: %w", err)
	}
	type product struct {
		path string
		made time.Time
	}
	var products []product
	for _, e := range entries {
		info, err := e.Info()
		if err != nil || !e.IsDir() {
			continue
		}
		products = append(products, product{filepath.Join(parent, e.Name()), info.ModTime()})
	}
	slices.SortFunc(products, func(a, b product) int { return b.made.Compare(a.made) })
	for _, p := range products[min(keep, len(products)):] {
		if err := os.RemoveAll(p.path); err != nil {
			return fmt.Errorf("removing an old product: %w", err)
		}
	}
	return nil
}

// lock waits for the exclusive lock on a file. The kernel drops it when the
// process ends, however it ends, which a lock file that merely exists would not.
func lock(ctx context.Context, path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("opening the lock: %w", err)
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			f.Close()
			return nil, fmt.Errorf("locking %s: %w", path, err)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("waiting for the lock on %s: %w", path, ctx.Err())
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
