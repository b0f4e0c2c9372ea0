package remedy

import (
	"testing"
	"time"

	"github.com/hosthygiene/agent/pkg/config"
)

func TestWindowOpen(t *testing.T) {
	type window = config.MaintenanceWindow
	saturday := &window{Days: []string{"Sat"}, From: "02:00", To: "05:00"}
	overnight := &window{Days: []string{"Sat"}, From: "22:00", To: "05:30", TimeZone: "Europe/Berlin"}
	gap := &window{From: "02:30", To: "04:00", TimeZone: "Europe/Berlin"}
	inGap := &window{From: "02:10", To: "02:50", TimeZone: "Europe/Berlin"}
	twice := &window{From: "02:00", To: "02:30", TimeZone: "Europe/Berlin"}
	for _, tc := range []struct {
		name string
		w    *window
		now  string
		open bool
	}{
		{"no window", nil, "2026-11-21T12:00:00Z", true},
		{"its first minute", saturday, "2026-11-21T02:00:00Z", true},
		{"a second before", saturday, "2026-11-21T01:59:59Z", false},
		{"its last second", saturday, "2026-11-21T04:59:59Z", true},
		{"its end does not belong to it", saturday, "2026-11-21T05:00:00Z", false},
		{"the day after", saturday, "2026-11-22T03:00:00Z", false},
		{"any day without days", &window{From: "02:00", To: "05:00"}, "2026-11-24T03:00:00Z", true},
		{"the same moment named in another zone", saturday, "2026-11-21T12:00:00+09:00", true},
		{"another day there than in UTC", &window{Days: []string{"Sat"}, From: "02:00", To: "05:00", TimeZone: "Asia/Tokyo"}, "2026-11-20T18:00:00Z", true},
		{"another day in UTC than there", &window{Days: []string{"Sat"}, From: "02:00", To: "05:00", TimeZone: "Asia/Tokyo"}, "2026-11-21T18:00:00Z", false},

		{"overnight: the evening of its day", overnight, "2026-11-21T22:30:00+01:00", true},
		{"overnight: the morning after", overnight, "2026-11-22T05:29:59+01:00", true},
		{"overnight: closed at its end", overnight, "2026-11-22T05:30:00+01:00", false},
		{"overnight: the morning of its day belongs to the day before", overnight, "2026-11-21T03:00:00+01:00", false},
		{"overnight: the evening after", overnight, "2026-11-22T22:30:00+01:00", false},
		{"overnight from Saturday into Sunday", &window{Days: []string{"Sun"}, From: "23:00", To: "01:00"}, "2026-11-23T00:30:00Z", true},
		{"until the end of the day", &window{From: "22:00", To: "00:00"}, "2026-11-21T23:59:00Z", true},
		{"until the end of the day, over", &window{From: "22:00", To: "00:00"}, "2026-11-22T00:00:00Z", false},

		// Berlin, 2026-03-29: 02:00 CET is 03:00 CEST.
		{"begins in the hour left out: before it", gap, "2026-03-29T00:59:59Z", false},
		{"begins in the hour left out: right after it", gap, "2026-03-29T01:00:00Z", true},
		{"begins in the hour left out: to its end on the wall", gap, "2026-03-29T01:59:59Z", true},
		{"begins in the hour left out: over", gap, "2026-03-29T02:00:00Z", false},
		{"all of it left out: before", inGap, "2026-03-29T00:59:59Z", false},
		{"all of it left out: after", inGap, "2026-03-29T01:00:00Z", false},
		{"overnight across the hour left out", overnight, "2026-03-29T03:29:59Z", true},
		{"overnight across the hour left out, over", overnight, "2026-03-29T03:30:00Z", false},
		// Berlin, 2026-10-25: 03:00 CEST is 02:00 CET.
		{"the hour that comes twice, first", twice, "2026-10-25T00:15:00Z", true},
		{"the hour that comes twice, between", twice, "2026-10-25T00:45:00Z", false},
		{"the hour that comes twice, second", twice, "2026-10-25T01:15:00Z", true},
		{"the hour that comes twice, over", twice, "2026-10-25T01:30:00Z", false},
		{"overnight across the hour that comes twice", overnight, "2026-10-25T04:29:59Z", true},
		{"overnight across the hour that comes twice, over", overnight, "2026-10-25T04:30:00Z", false},
		// Havana, 2026-03-08: midnight is 01:00.
		{"a day without a midnight", &window{Days: []string{"Sat"}, From: "23:00", To: "01:30", TimeZone: "America/Havana"}, "2026-03-08T05:15:00Z", true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			now, err := time.Parse(time.RFC3339, tc.now)
			if err != nil {
				t.Fatal(err)
			}
			open, err := WindowOpen(tc.w, now)
			if err != nil {
				t.Fatal(err)
			}
			if open != tc.open {
				t.Errorf("open %t, want %t", open, tc.open)
			}
		})
	}
}

// A window that can not be read is closed.
func TestWindowThatCanNotBeRead(t *testing.T) {
	for _, w := range []config.MaintenanceWindow{
		{From: "02:00", To: "05:00", TimeZone: "Mars/Olympus"}, {From: "2 am", To: "05:00"}, {From: "02:00", To: "25:00"},
	} {
		if open, err := WindowOpen(&w, time.Now()); err == nil || open {
			t.Errorf("%+v: open %t, error %v", w, open, err)
		}
	}
}
