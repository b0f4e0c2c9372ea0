package terminal

import (
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"
)

// screen is one line of a terminal, as carriage returns leave it.
type screen struct {
	mu      sync.Mutex
	line    []rune
	col     int
	written int
}

func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range string(p) {
		s.written++
		switch r {
		case '\r':
			s.col = 0
		case '\n':
			s.line, s.col = nil, 0
		default:
			if s.col == len(s.line) {
				s.line = append(s.line, ' ')
			}
			s.line[s.col] = r
			s.col++
		}
	}
	return len(p), nil
}

func (s *screen) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.TrimRight(string(s.line), " ")
}

func TestProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s screen
		p := &Progress{to: &s, width: func() int { return 40 }}
		see := func(want string) {
			t.Helper()
			synctest.Wait()
			if s.String() != want {
				t.Errorf("to be seen: %q, want %q", s.String(), want)
			}
		}
		p.Say("quick")
		time.Sleep(1900 * time.Millisecond)
		p.Done()
		if s.written > 0 {
			t.Errorf("what takes less than two seconds wrote %q", s.String())
		}
		time.Sleep(10 * time.Second)
		see("")

		p.Say("reading %s", "nodes")
		time.Sleep(time.Second)
		p.Say("a long text about what is going on at present \x1b[2J") // the clock runs on
		time.Sleep(1100 * time.Millisecond)
		see("a long text about what is going o… (2s)")
		if n := utf8.RuneCountInString(s.String()); n >= 40 {
			t.Errorf("%d columns of 40", n)
		}
		left := 2
		p.Follow(func() string { left--; return strings.Repeat("x", left) + "\x1b" })
		time.Sleep(500 * time.Millisecond)
		see(`x\u001b (2s)`)
		time.Sleep(500 * time.Millisecond)
		see(`\u001b (3s)`)
		p.Say("applying")
		if _, err := p.Over(&s).Write([]byte("a log line")); err != nil {
			t.Fatal(err)
		}
		see("a log line")
		s.Write([]byte("\n"))
		time.Sleep(500 * time.Millisecond)
		see("applying (3s)")
		if _, err := p.Until(&s).Write([]byte("the answer")); err != nil {
			t.Fatal(err)
		}
		see("the answer")
		time.Sleep(10 * time.Second)
		see("the answer")
		s.Write([]byte("\n"))
		p.Say("more")
		time.Sleep(2 * time.Second)
		see("more (2s)")
		p.Done()
		p.Done()
		see("")
		if s.col != 0 {
			t.Errorf("the next line begins in column %d", s.col)
		}
		// What begins anew has its two seconds again.
		p.Say("again")
		time.Sleep(1900 * time.Millisecond)
		see("")
		p.Done()
	})
}

// TestProgressOnce: where a line can not be taken back it is written once.
func TestProgressOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b strings.Builder
		p := &Progress{to: &b, width: func() int { return 80 }, once: true}
		p.Say("reading nodes")
		time.Sleep(time.Minute)
		p.Done()
		if b.String() != "reading nodes (2s)\n" {
			t.Errorf("%q", b.String())
		}
	})
}

// TestNoProgress: through a pipe and into a file nothing is ever said.
func TestNoProgress(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	p := NewProgress(w, w)
	if p != nil {
		t.Fatal("a pipe gets progress")
	}
	p.Say("nothing")
	if p.Over(w) != w {
		t.Error("Over is in the way of a pipe")
	}
	p.Done()
}
