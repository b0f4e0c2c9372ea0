package probes

import (
	"errors"
	"hash/maphash"
	"io/fs"
	"maps"
	"time"
)

// settled remembers what was found well and hangs on facts that are fixed as
// long as a device lives, such as the target behind a disk: asking all of some
// thousand disks for it every minute was a quarter of a pass. Only health is
// remembered, of exactly the devices that were looked at, and for ten minutes at
// most, in which a disk may have been replaced by another of the same name,
// identity, size and place. What was wrong is looked at in every pass.
type settled struct {
	seed maphash.Seed
	seen map[string]settledUntil
}

type settledUntil struct {
	sum   uint64
	until time.Time
}

// settledFor is how long health is remembered at least; it is up to twice as
// long, so that thousands of things are not all looked at in one pass.
const settledFor = 5 * time.Minute

// seldomFor is how long what hardly ever changes is remembered without being told:
// looked at every five minutes, all of that kind together were a quarter of what an
// idle agent used.
const seldomFor = 15 * time.Minute

// settledIn returns what a probe remembers under a name of its own.
func settledIn(m *Memory, name string, now time.Time) settled {
	s, ok := Kept[settled](m, name)
	if !ok {
		s = settled{seed: maphash.MakeSeed(), seen: map[string]settledUntil{}}
		m.Keep(name, s)
	}
	maps.DeleteFunc(s.seen, func(_ string, u settledUntil) bool {
		return !now.Before(u.until) || u.until.Sub(now) > 2*settledFor // the clock was set back
	})
	return s
}

// sum adds facts to a fingerprint, which begins as 0.
func (s settled) sum(sum uint64, facts ...string) uint64 {
	for _, f := range facts {
		sum = sum*31 + maphash.String(s.seed, f)
	}
	return sum
}

// is reports whether the thing was well with the same facts.
func (s settled) is(thing string, sum uint64) bool {
	u, ok := s.seen[thing]
	return ok && u.sum == sum
}

// remember notes that the thing is well.
func (s settled) remember(thing string, sum uint64, now time.Time) {
	s.seen[thing] = settledUntil{sum, now.Add(settledFor + time.Duration(sum%uint64(settledFor)))}
}

// elapsed reports whether the time is over, or the clock was set back.
func elapsed(now, since time.Time, d time.Duration) bool {
	return now.Before(since) || now.Sub(since) >= d
}

// remembered returns what read gave when it was last called with the same sign,
// which was seldomFor ago at most. What is missing is remembered as well; another
// error is not. For what hardly changes and takes effect later, or elsewhere, so
// that nobody waits for it to be told.
func remembered[T any, S comparable](in Input, name string, sign S, read func() (T, error)) (T, error) {
	type dated struct {
		value T
		err   error
		sign  S
		at    time.Time
	}
	name = "remembered: " + name
	if was, ok := Kept[dated](in.Memory, name); ok && was.sign == sign && !elapsed(in.Now, was.at, seldomFor) {
		return was.value, was.err
	}
	value, err := read()
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		in.Memory.Keep(name, dated{value, err, sign, in.Now})
	}
	return value, err
}
