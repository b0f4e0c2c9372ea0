package terminal

import (
	"cmp"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"
	"unicode/utf8"
)

const (
	// patience is how long nobody minds that nothing is said.
	patience = 2 * time.Second
	// redraw is how often the line is written again.
	redraw = time.Second / 2
)

// Progress says what a command is at, to a person at a terminal and on standard
// error, once there has been nothing to see for two seconds: one line, rewritten,
// and erased by Done. It is written with blanks and carriage returns only, which
// every terminal understands. A nil Progress says nothing.
type Progress struct {
	to    io.Writer
	width func() int
	// once: the terminal can not go back in its line, so one is written and left.
	once bool

	mu    sync.Mutex
	at    func() string
	begun time.Time
	drawn int           // runes of the line that is to be seen
	stop  chan struct{} // nil while nothing is under way
}

// NewProgress returns one for a command that writes to out and complains to
// errOut: nil unless a person sees both.
func NewProgress(out, errOut io.Writer) *Progress {
	f, ok := errOut.(*os.File)
	if !ok || !Is(out) || !Is(errOut) {
		return nil
	}
	return &Progress{to: f, width: func() int { return Width(f) }, once: os.Getenv("TERM") == "dumb"}
}

// Say says what is going on from now on. It is also the beginning, when nothing
// was.
func (p *Progress) Say(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	p.Follow(func() string { return text })
}

// Follow is Say for what changes: at is asked whenever the line is written, from
// another goroutine.
func (p *Progress) Follow(at func() string) {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.at = at
	if p.stop == nil {
		p.begun, p.stop = time.Now(), make(chan struct{})
		go p.show(p.stop)
	}
}

// Done erases the line: something else is to be shown, or all is done.
func (p *Progress) Done() {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stop == nil {
		return
	}
	close(p.stop)
	p.stop = nil
	p.erase()
}

// Over returns a writer to the same terminal whose lines take the place of the
// one that is shown.
func (p *Progress) Over(w io.Writer) io.Writer {
	if p == nil {
		return w
	}
	return over{p, w}
}

type over struct {
	p *Progress
	w io.Writer
}

func (o over) Write(b []byte) (int, error) {
	o.p.mu.Lock()
	defer o.p.mu.Unlock()
	o.p.erase()
	return o.w.Write(b)
}

// Until returns a writer to the same terminal with whose first line all is done.
func (p *Progress) Until(w io.Writer) io.Writer {
	if p == nil {
		return w
	}
	return until{p, w}
}

type until struct {
	p *Progress
	w io.Writer
}

func (u until) Write(b []byte) (int, error) {
	u.p.Done()
	return u.w.Write(b)
}

func (p *Progress) show(stop chan struct{}) {
	next := time.NewTimer(patience)
	defer next.Stop()
	for {
		select {
		case <-stop:
			return
		case <-next.C:
		}
		p.mu.Lock()
		// Done may have come first, and something else begun since.
		if p.stop != stop {
			p.mu.Unlock()
			return
		}
		p.draw()
		p.mu.Unlock()
		if p.once {
			return
		}
		next.Reset(redraw)
	}
}

// draw writes the line over the one before.
func (p *Progress) draw() {
	took := fmt.Sprintf(" (%s)", time.Since(p.begun).Truncate(time.Second))
	// A line that goes on in the next row could not be erased.
	columns := cmp.Or(p.width(), 80) - 1
	room := columns - len(took)
	if room < 20 {
		room, took = columns, ""
	}
	line := cut(Line(p.at()), room) + took
	if p.once {
		fmt.Fprintln(p.to, line)
		return
	}
	n := utf8.RuneCountInString(line)
	fmt.Fprint(p.to, "\r"+line+strings.Repeat(" ", max(0, p.drawn-n)))
	p.drawn = n
}

func (p *Progress) erase() {
	if p.drawn > 0 {
		fmt.Fprint(p.to, "\r"+strings.Repeat(" ", p.drawn)+"\r")
		p.drawn = 0
	}
}

// cut shortens text to at most so many columns.
func cut(text string, columns int) string {
	if utf8.RuneCountInString(text) <= columns {
		return text
	}
	runes := []rune(text)
	return string(runes[:max(0, columns-1)]) + "…"
}
