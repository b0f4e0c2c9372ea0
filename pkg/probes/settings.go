package probes

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Common are the settings every probe has.
type Common struct {
	// Enabled: false switches the probe off.
	Enabled *bool `json:"enabled,omitempty"`
	// Required makes Unknown count against hosthygiene.io/Ready.
	Required bool `json:"required,omitempty"`
	// Interval overrides how often this probe runs.
	Interval Duration `json:"interval,omitempty"`
}

// General returns the settings themselves, for code that holds a [Probe].
func (c Common) General() Common { return c }

// Rarely implements [Probe], for most.
func (Common) Rarely() bool { return false }

// On reports whether the probe is switched on.
func (c Common) On() bool { return c.Enabled == nil || *c.Enabled }

// Duration is a time.Duration that is written as "50ms" or "10m" in the config.
type Duration time.Duration

// D is the value as the standard library's type.
func (d Duration) D() time.Duration { return time.Duration(d) }

// String is the shortest common form: "10m", not "10m0s".
func (d Duration) String() string {
	s := time.Duration(d).String()
	if strings.HasSuffix(s, "m0s") {
		s = s[:len(s)-2]
	}
	if strings.HasSuffix(s, "h0m") {
		s = s[:len(s)-2]
	}
	return s
}

// MarshalJSON implements json.Marshaler.
func (d Duration) MarshalJSON() ([]byte, error) { return json.Marshal(d.String()) }

// UnmarshalJSON implements json.Unmarshaler.
func (d *Duration) UnmarshalJSON(data []byte) error {
	var s string
	if err := json.Unmarshal(data, &s); err != nil {
		return fmt.Errorf("want a duration with a unit in quotes, such as \"50ms\", \"10s\" or \"5m\", not %s", data)
	}
	v, err := time.ParseDuration(s)
	if err != nil {
		return fmt.Errorf("want a duration with a unit, such as 50ms, 10s or 5m, not %q", s)
	}
	*d = Duration(v)
	return nil
}

// Percent is a share of a whole, written as "80%" in the config.
type Percent float64

// String is the form of the config.
func (p Percent) String() string { return strconv.FormatFloat(float64(p), 'f', -1, 64) + "%" }

// Of returns the share of n.
func (p Percent) Of(n float64) float64 { return n * float64(p) / 100 }

// MarshalJSON implements json.Marshaler.
func (p Percent) MarshalJSON() ([]byte, error) { return json.Marshal(p.String()) }

// UnmarshalJSON implements json.Unmarshaler.
func (p *Percent) UnmarshalJSON(data []byte) error {
	wrong := fmt.Errorf("want a percentage from 0%% to 100%%, such as \"80%%\", not %s", data)
	var s string
	if json.Unmarshal(data, &s) != nil {
		return wrong
	}
	num, ok := strings.CutSuffix(s, "%")
	v, err := strconv.ParseFloat(num, 64)
	if !ok || err != nil || !(v >= 0 && v <= 100) {
		return wrong
	}
	*p = Percent(v)
	return nil
}

// A FieldError is an impossible or contradictory setting, found after decoding.
type FieldError struct {
	// Field is the path below the value that was validated, e.g. "maxOffset".
	Field string
	// Problem says what is wrong and what would be right.
	Problem string
}

func (e *FieldError) Error() string { return e.Field + ": " + e.Problem }

func fieldErr(field, format string, args ...any) error {
	return &FieldError{field, fmt.Sprintf(format, args...)}
}

// positive is the check most durations need.
func positive(field string, d Duration) error {
	if d <= 0 {
		return fieldErr(field, "want more than 0, not %s", d)
	}
	return nil
}

// FieldErrors flattens a joined error into its FieldErrors.
func FieldErrors(err error) []*FieldError {
	if err == nil {
		return nil
	}
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		var all []*FieldError
		for _, e := range joined.Unwrap() {
			all = append(all, FieldErrors(e)...)
		}
		return all
	}
	var fe *FieldError
	if errors.As(err, &fe) {
		return []*FieldError{fe}
	}
	return []*FieldError{{Problem: err.Error()}}
}
